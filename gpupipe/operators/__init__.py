"""One module per family of operators: what is recognised, and how it is specified."""
