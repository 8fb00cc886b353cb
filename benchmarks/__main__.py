"""The benchmarks that need no GPU, one after the other, from the root of a checkout.

``python -m benchmarks --folder benchmarks/results`` keeps their JSON; see ``README.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = {
    "bench_normalize": "normalize_cpu.json",
    "bench_loader": "loader_cpu.json",
    "bench_augment": "augment_cpu.json",
}


def main() -> None:
    """Run each in a process of its own, and end with an error if one did."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="other options are handed on")
    parser.add_argument("--folder", type=Path, help="where each writes its JSON; default: nowhere")
    arguments, rest = parser.parse_known_args()
    failed = []
    for name, report in BENCHMARKS.items():
        json = ["--json", str(arguments.folder / report)] if arguments.folder else []
        command = [sys.executable, "-m", f"benchmarks.{name}", *rest, *json]
        if subprocess.run(command, check=False).returncode:  # noqa: S603 # our own module
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
