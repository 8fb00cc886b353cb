"""A pause for the garbage collector while modules are imported.

After ``import torch`` a full collection is due, and the next few thousand objects set it off: 0.2 s
over torch's objects, amid imports of 50 ms (gpupipe) or 150 ms (numba). It comes later, with the
user's own objects.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector from running inside; leave it as it was."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
