"""``gpupipe demo``: statistics, the proof of equal bits, a race, and a training run."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import nn
from torch.nn import functional
from torchvision import transforms as T  # noqa: N812 # as everyone writes it

from gpupipe import contact_sheet, demo_data, demo_race
from gpupipe._version import __version__
from gpupipe.demo_data import DemoData
from gpupipe.demo_race import Contender
from gpupipe.errors import InputError, VerificationError
from gpupipe.loader import DataLoader
from gpupipe.stats import ChannelStats, channel_stats
from gpupipe.threads import cpu_count
from gpupipe.verify import Verification, verify

PUBLISHED = "0.2860 / 0.3530"
ROUNDS = 3
SHOWN = 32
"""Images on the contact sheet."""


def run(
    console: Console,
    *,
    data: Path | None = None,
    out: Path = Path("gpupipe-demo.png"),
    device: str | None = None,
    quick: bool = False,
) -> None:
    """Run the demo.

    Args:
        console: where to print.
        data: see ``demo_data.load``.
        out: of the contact sheet.
        device: where to train; None: the GPU if there is one.
        quick: few images, one round.

    Raises:
        InputError: ``data`` without Fashion-MNIST, a folder for ``out`` that is not there.
        SourceError: damaged data.
        VerificationError: a bit that differs from torchvision's.
    """
    if not out.resolve().parent.is_dir():
        raise InputError(f"--out must lie in a folder that is there, got {out}; make the folder")
    began = time.perf_counter()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else "no GPU used"
    console.print(
        f"[bold]gpupipe {__version__}[/]  torch {torch.__version__}, Python "
        f"{platform.python_version()}, {cpu_count()} CPUs, {hardware}"
    )
    counts = (2_000, 500) if quick else (12_000, 2_000)
    found = demo_data.load(data, lambda text: console.print(f"[yellow]{text}[/]"), counts=counts)
    _say_if_busy(console)
    console.print(f"data: {found.name}, {len(found.train):,} + {len(found.test):,} images\n")
    stats = _statistics(console, found)
    transform = T.Compose([T.ToTensor(), T.Normalize(_rounded(stats.mean), _rounded(stats.std))])
    found.train.transform = found.test.transform = transform
    proof = _bits(console, found, where)
    racers = _race(console, found, where, quick=quick)
    # More threads than one get in each other's way in a network as small as this.
    with demo_race.torch_threads(1):
        accuracy, waited = _train(console, found, where, quick=quick)
    _sheet(found, where, out)
    _results(console, found, stats, proof, racers, accuracy, waited)
    console.print(f"contact sheet: {out}   all of it took {time.perf_counter() - began:.0f} s\n")
    console.print("[bold]Next:[/] two lines in your own script, then [bold]gpupipe explain[/]:")
    console.print("[green]+ import gpupipe\n+ loader = gpupipe.lift(loader)[/]", highlight=False)


def _say_if_busy(console: Console) -> None:
    """Warn that the figures will be noisy."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cpu_count() / 2:
        console.print(
            f"[yellow]Other programs are running (load {load:.1f} on {cpu_count()} CPUs): the "
            "figures below will be noisy, and torch's with several threads far too low.[/]"
        )


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    """Round as people write the constants down."""
    return tuple(round(value, 4) for value in values)


def _statistics(console: Console, found: DemoData) -> ChannelStats:
    """Compute mean and std, next to the published ones."""
    start = time.perf_counter()
    stats = channel_stats(found.train, progress=False)
    seconds = time.perf_counter() - start
    known = "drawn data: nothing is published" if found.drawn else f"published {PUBLISHED}"
    console.print(
        f"1. channel statistics in {seconds * 1e3:.0f} ms: mean / std "
        f"[bold]{stats.mean[0]:.4f} / {stats.std[0]:.4f}[/] ({known})"
    )
    return stats


def _bits(console: Console, found: DemoData, device: torch.device) -> Verification:
    """Compare with torchvision, and stop if a bit differs."""
    loader = DataLoader(found.train, batch_size=demo_race.BATCH, device=device)
    proof = verify(loader, samples=1024)
    proof.check()
    samples = max(row.samples for row in proof.rows)
    made = "the fused kernel" if proof.fused else f"torch itself ({proof.reason})"
    console.print(
        f"2. bits: {samples:,} samples by {made} equal torchvision's, [green]every bit the same[/]"
    )
    return proof


def _race(
    console: Console, found: DemoData, device: torch.device, *, quick: bool
) -> list[Contender]:
    """Check the contenders' batches, then time them in turns."""
    racers = demo_race.contenders(found.train, device, quick=quick)
    rounds = 1 if quick else ROUNDS
    with console.status("3. the same shuffled batches, side by side: checking"):
        demo_race.check(racers)
    if not racers[-1].same:
        raise VerificationError(
            "gpupipe's first shuffled batches differ from the torch loader's with the same seed; "
            "please report this with your versions"
        )
    for number in range(rounds):
        for racer in racers:
            with console.status(f"3. round {number + 1} of {rounds}: {racer.name}"):
                demo_race.turn(racer, number, device)
    console.print(
        f"3. raced {len(racers)} loaders in turns, {rounds} round(s): the table has the medians"
    )
    return racers


class Net(nn.Sequential):
    """A small CNN, 28x28 grey in, 10 classes out."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )


def _train(
    console: Console, found: DemoData, device: torch.device, *, quick: bool
) -> tuple[float, float]:
    """Train for an epoch; return the test accuracy and the share of time waiting for data."""
    torch.manual_seed(0)
    loader = DataLoader(found.train, batch_size=64, shuffle=True, device=device)
    steps = min(len(loader), 30) if quick else len(loader)
    model = Net().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    columns = (
        "4. training, one epoch",
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s, {task.fields[waited]:.1%} waiting for data"),
    )
    images, start = 0, time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, rate=0.0, waited=0.0)
        for step, (x, y) in enumerate(loader, 1):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            images += len(x)
            seconds = time.perf_counter() - start
            waited = loader.stats.seconds_waited / seconds
            progress.update(task, completed=step, rate=images / seconds, waited=waited)
            if step == steps:
                break
    return _accuracy(model, found, device), waited


def _accuracy(model: nn.Module, found: DemoData, device: torch.device) -> float:
    """Return the share of the test images that the model gets right."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for x, y in DataLoader(found.test, batch_size=1000, device=device):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(found.test)


def _sheet(found: DemoData, device: torch.device, out: Path) -> None:
    """Draw the first images of a shuffled batch before and after."""
    loader: Any = DataLoader(
        found.train, batch_size=SHOWN, shuffle=True, device=device, return_indices=True
    )
    (images, labels), indices = next(iter(loader))
    raw = found.train.data[indices].numpy()
    names = [found.train.classes[label] for label in labels.tolist()]
    title = f"gpupipe {__version__}, one batch of {found.name}"
    contact_sheet.save(out, raw, images[:, 0].cpu().numpy(), names, title)


def _results(
    console: Console,
    found: DemoData,
    stats: ChannelStats,
    proof: Verification,
    racers: list[Contender],
    accuracy: float,
    waited: float,
) -> None:
    """Print the table."""
    table = Table(title=f"{found.name}, batch {demo_race.BATCH}, shuffled", title_justify="left")
    table.add_column("batches made by")
    for heading in ("images/s", "ratio", "bits"):
        table.add_column(heading, justify="right")
    base = racers[0].rate
    for racer in racers:
        same = "reference" if racer is racers[0] else "same" if racer.same else "DIFFERENT"
        table.add_row(racer.name, f"{racer.rate:,.0f}", f"{racer.rate / base:,.1f}x", same)
    console.print()
    console.print(table)
    worst = max(row.different for row in proof.rows)
    console.print(
        f"mean / std {stats.mean[0]:.4f} / {stats.std[0]:.4f}; {worst} samples differ from "
        f"torchvision; test accuracy [bold]{accuracy:.1%}[/] on {len(found.test):,} held-out "
        f"images after one epoch; {waited:.1%} of the time waiting for data"
    )
