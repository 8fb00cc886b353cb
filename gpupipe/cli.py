"""The command ``gpupipe``: demo, stats, verify, explain.

Exit codes: 0 all well, 1 bits differ, 2 an error, told in one message.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset

from gpupipe import ArrayDataset, DataLoader, channel_stats, lift
from gpupipe import verify as compare
from gpupipe._version import __version__
from gpupipe.errors import GpupipeError, GpupipeWarning, InputError
from gpupipe.named import load
from gpupipe.plan import Plan

app = typer.Typer(
    name="gpupipe",
    help="Your torchvision pipeline, compiled to one CUDA kernel. Same bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    Path | None,
    typer.Option(help="Folder that holds FashionMNIST/; else $GPUPIPE_DATA, else a download."),
]
Target = Annotated[
    str, typer.Argument(metavar="MODULE:NAME", help="train.py:loader or package.module:loader")
]

_WHERE = {
    "fused": ("fused", "green"),
    "cpu": ("on the CPU", "yellow"),
    "refused": ("refused", "red"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every error of gpupipe's tree becomes one message and exit code 2.

    Args:
        arguments: default: ``sys.argv[1:]``.
    """
    try:
        with _kind_warnings():
            app(arguments, prog_name="gpupipe")
    except GpupipeError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(2)


@contextmanager
def _kind_warnings() -> Iterator[None]:
    """Print gpupipe's own warnings as one line each, without the place in its source."""
    console = Console(stderr=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always", GpupipeWarning)
        # verify and explain say so themselves, with the reason.
        warnings.filterwarnings("ignore", "nothing was fused", GpupipeWarning)
        usual, said = warnings.showwarning, set[str]()

        def show_warning(
            message: Warning | str, category: type[Warning], *place: Any, **more: Any
        ) -> None:
            if not isinstance(message, GpupipeWarning):
                usual(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                console.print(Text.assemble(("warning: ", "bold yellow"), str(message)))

        warnings.showwarning = show_warning  # restored by catch_warnings
        yield


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gpupipe {__version__}")  # noqa: T201 # that is the command
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def demo(
    *,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="The contact sheet.")] = Path("gpupipe-demo.png"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; else a GPU if any.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few images: a smoke test.")] = False,
) -> None:
    """Statistics, equal bits, a race and a training run on Fashion-MNIST, in under a minute."""
    from gpupipe import demo as tour

    tour.run(Console(), data=data, out=out, device=device, quick=quick)


@app.command()
def stats(
    dataset: Annotated[
        str, typer.Argument(help="MODULE:NAME of a dataset, a .npy file, or fashion-mnist")
    ],
    *,
    data: Data = None,
) -> None:
    """Mean and standard deviation per channel, exact, ready to paste into Normalize."""
    console = Console()
    images = _images(dataset, data, console)
    start = time.perf_counter()
    result = channel_stats(images)
    seconds = time.perf_counter() - start
    table = Table("channel", "mean", "std")
    for channel, (mean, std) in enumerate(zip(result.mean, result.std, strict=True)):
        table.add_row(str(channel), f"{mean:.6f}", f"{std:.6f}")
    console.print(table)
    console.print(f"{result.images:,} images, {result.pixels:,} pixels a channel, {seconds:.2f} s")
    console.print(Text(str(result), "green"), soft_wrap=True)


def _images(name: str, data: Path | None, console: Console) -> Any:
    """Return what ``stats`` counts."""
    if name == "fashion-mnist":
        from torchvision import datasets

        from gpupipe import demo_data

        root = demo_data.find(data, console.print)
        if root is None:
            raise InputError(
                "fashion-mnist is not on this machine and cannot be downloaded; pass --data DIR"
            )
        return datasets.FashionMNIST(str(root))
    if name.endswith(".npy"):
        if not Path(name).is_file():
            raise InputError(f"there is no file {name}; check the path")
        return ArrayDataset(name)
    found = load(name)
    return found.dataset if isinstance(found, TorchDataLoader) else found


@app.command()
def explain(target: Target) -> None:
    """Show what runs where, and why, for a DataLoader or dataset; needs no GPU."""
    show(_loader(target).plan, Console())


def show(plan: Plan, console: Console) -> None:
    """Print a plan as a table, one row per operator."""
    table = Table("", "operator", "where", "why", show_lines=True)
    for position, operator, where, why in plan.rows():
        word, colour = _WHERE[where]
        table.add_row(position, Text(operator), Text(word, colour), Text(why))
    lines = [("source", plan.source or "dataset[i]"), ("delivery", plan.delivery)]
    if plan.reason:
        lines.append(("note" if plan.fused else "not lifted", plan.reason))
    lines += [("note", f"{note} ({count} times)") for note, count in plan.notes.items()]
    if plan.deviations:
        lines.append(("deviations", f"{plan.deviations} samples took the original transform"))
    if plan.rows():
        console.print(table)
    else:
        console.print("no torchvision transform was found")
    for head, text in lines:
        console.print(Text.assemble((f"{head}: ", "bold"), text))


@app.command()
def verify(
    target: Target,
    *,
    samples: Annotated[int, typer.Option(help="How many, drawn at random.")] = 256,
    seed: Annotated[int, typer.Option(help="For the choice and for random operators.")] = 0,
) -> None:
    """Compare batches with torchvision's own, bit by bit; exit code 1 if one bit differs."""
    console = Console()
    loader = _loader(target)
    result = compare(loader, samples=samples, seed=seed)
    table = Table("item", "dtype", "shape", "samples", "differ", "largest difference")
    for row in result.rows:
        cells = (row.path, row.dtype, str(row.shape), str(row.samples), str(row.different))
        table.add_row(*map(Text, cells), f"{row.worst:.3g}", style="red" if row.different else "")
    console.print(table)
    made = "the fused kernel" if result.fused else f"torch itself, not lifted: {result.reason}"
    console.print(Text(f"images made by {made}"))
    if result.deviations:
        console.print(f"{result.deviations} samples went through the original transform")
    console.print(Text("same bits", "green") if result.ok else Text("DIFFERENT", "bold red"))
    if not result.ok:
        raise typer.Exit(1)


def _loader(target: str) -> DataLoader[Any]:
    """Return the user's loader, lifted; a dataset is wrapped."""
    found = load(target)
    if isinstance(found, DataLoader):
        return found
    if isinstance(found, TorchDataLoader):
        return lift(found)
    if isinstance(found, Dataset) or hasattr(type(found), "__getitem__"):
        return DataLoader(found, batch_size=32)
    raise InputError(
        f"{target} must be a DataLoader, a dataset, or a function without arguments that returns "
        f"one, got {type(found).__name__}; name another object"
    )
