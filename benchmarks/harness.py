"""What every benchmark shares: check first, take turns, report medians with their conditions.

A contest lets its contenders run in a random order in every round, so that a machine that slows
down slows all of them. Ratios are taken round by round. No contender is timed before its result
was compared with torchvision's.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("gpupipe", "torch", "torchvision", "numpy", "numba", "pillow", "cupy-cuda13x")


class WrongResultError(Exception):
    """A contender does not compute what torchvision computes."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: in the table.
        run: does the work once; returns how many items it did, and what must stay alive until the
            clock was read.
        answer: makes tensors to compare with torchvision's; None for a limit, which computes
            nothing.
        prepare: before each ``run``, not timed.
        tolerance: the largest difference that is stated instead of refused; 0: same bits.
        note: what a reader of the table must know.
    """

    name: str
    run: Callable[[], tuple[int, Any]]
    answer: Callable[[], Sequence[torch.Tensor]] | None
    prepare: Callable[[], object] = lambda: None
    tolerance: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """``contender`` makes at least ``ratio`` times the items/s of the fastest of ``over``."""

    contender: str
    over: tuple[str, ...]
    ratio: float


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``rounds`` of at least ``seconds`` for each contender."""

    rounds: int
    seconds: float


def compare(
    name: str, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float = 0.0
) -> str:
    """Return "same bits", or by how much two results differ.

    Args:
        name: whose result it is.
        got: its tensors.
        wanted: torchvision's.
        tolerance: the largest difference to accept.

    Raises:
        WrongResultError: another count, dtype, shape or memory format, or a larger difference.
    """
    if len(got) != len(wanted) or not wanted:
        raise WrongResultError(f"{name}: {len(got)} tensors where torchvision gives {len(wanted)}")
    differing, total, largest = 0, 0, 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            came, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (ours, theirs))
            raise WrongResultError(f"{name}: {came}, torchvision gives {expected}")
        for style in (torch.contiguous_format, torch.channels_last):
            if theirs.is_contiguous(memory_format=style) != ours.is_contiguous(memory_format=style):
                raise WrongResultError(f"{name}: strides {ours.stride()}, not {theirs.stride()}")
        mine = ours.detach().to("cpu").contiguous()
        reference = theirs.to("cpu").contiguous()
        total += mine.numel()
        if torch.equal(mine.view(torch.uint8), reference.view(torch.uint8)):
            continue
        gap = (mine.double() - reference.double()).abs()
        differing += int((gap != 0).sum())
        largest = max(largest, float(gap.max()))
        if not float(gap.max()) <= tolerance:  # NaN never passes
            raise WrongResultError(
                f"{name}: differs from torchvision by up to {float(gap.max()):.3g} "
                f"(accepted: {tolerance:.3g})"
            )
    if not differing:
        return "same bits"
    return f"{differing / total:.1%} differ, by up to {largest:.1e}"


def check(contenders: Sequence[Contender], wanted: Sequence[torch.Tensor]) -> dict[str, str]:
    """Compare every contender's answer with torchvision's; see ``compare``."""
    return {
        c.name: compare(c.name, c.answer(), wanted, c.tolerance) if c.answer else "limit"
        for c in contenders
    }


def measure(contenders: Sequence[Contender], effort: Effort) -> dict[str, list[float]]:
    """Return items per second of every contender, round by round, after a round to warm up."""
    rates: dict[str, list[float]] = {c.name: [] for c in contenders}
    rng = random.Random(0)  # noqa: S311 # an order of turns
    for turn in range(effort.rounds + 1):
        for contender in rng.sample(contenders, len(contenders)):
            items, elapsed = 0, 0.0
            while elapsed < (effort.seconds if turn else effort.seconds / 4):
                contender.prepare()
                start = time.perf_counter()
                done, alive = contender.run()
                elapsed += time.perf_counter() - start
                items += done
                del alive
            if turn:
                rates[contender.name].append(items / elapsed)
    return rates


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(rates: dict[str, list[float]], name: str, over: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[over], strict=True))


@dataclass
class Report:
    """Tables, printed as Markdown as they come and written as JSON at the end."""

    question: str
    about: dict[str, Any]
    tables: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        """Print the conditions."""
        print(f"# {self.question}\n")
        for key, value in self.about.items():
            print(f"- {key}: {value}")

    def contest(
        self,
        title: str,
        contenders: Sequence[Contender],
        wanted: Sequence[torch.Tensor],
        effort: Effort,
        *,
        item_bytes: float,
        limit: Sequence[str] = (),
        goals: Sequence[Goal] = (),
    ) -> dict[str, list[float]]:
        """Check, measure and report; return the rates.

        Args:
            title: of the table, with sizes and dtypes.
            contenders: see ``Contender``; ratios are given to the first.
            wanted: what torchvision gives where a contender gives its answer.
            effort: how long to measure.
            item_bytes: read and written for an item by one that touches each byte once.
            limit: contenders; shares are taken of the fastest of them.
            goals: to print beside.
        """
        print(f"\n## {title}\n", flush=True)
        verdicts = check(contenders, wanted)
        rates = measure(contenders, effort)
        best = max(limit, key=lambda name: quartiles(rates[name])[1], default=None)
        rows = []
        for contender in contenders:
            name = contender.name
            low, median, high = quartiles(rates[name])
            row = {
                "contender": name, "items_per_s": median, "low": low, "high": high,
                "gb_per_s": median * item_bytes / 1e9,
                "of_limit": ratio(rates, name, best) if best else None,
                "times_first": ratio(rates, name, contenders[0].name),
                "bits": verdicts[name], "note": contender.note,
            }  # fmt: skip
            rows.append(row)
        reached = []
        for goal in goals:
            over = max(goal.over, key=lambda name: quartiles(rates[name])[1])
            text = f"{goal.contender} >= {goal.ratio:g} x {over}"
            reached.append(
                {"goal": text, "wanted": goal.ratio, "reached": ratio(rates, goal.contender, over)}
            )
        self._print(rows, contenders[0].name)
        self.tables.append(
            {
                "title": title,
                "rounds": effort.rounds,
                "seconds_per_round": effort.seconds,
                "rows": rows,
            }
        )
        self.goals(reached, largest=False)
        return rates

    def _print(self, rows: Sequence[dict[str, Any]], first: str) -> None:
        print(f"| contender | items/s (quartiles) | GB/s | of limit | x {first} | bits | note |")
        print("|---|---:|---:|---:|---:|---|---|")
        for row in rows:
            share = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
            spread = f"{row['items_per_s']:,.0f} ({row['low']:,.0f}-{row['high']:,.0f})"
            print(
                f"| {row['contender']} | {spread} | {row['gb_per_s']:.2f} | {share} | "
                f"{row['times_first']:.2f} | {row['bits']} | {row['note']} |"
            )

    def goals(self, reached: Sequence[dict[str, Any]], *, largest: bool) -> None:
        """Print and keep goals; ``largest``: what was wanted is the most that is accepted."""
        for goal in reached:
            met = (
                goal["reached"] <= goal["wanted"] if largest else goal["reached"] >= goal["wanted"]
            )
            print(f"\ngoal: {goal['goal']}: {goal['reached']:.4g}, {'met' if met else 'MISSED'}")
            self.tables[-1].setdefault("goals", []).append({**goal, "met": met})

    def values(
        self, title: str, values: Mapping[str, Sequence[float]], unit: str, most: dict[str, float]
    ) -> None:
        """Report numbers that are no contest; of those with a goal less is better.

        Args:
            title: of the table.
            values: repetitions by name.
            unit: of the numbers.
            most: the goals by name.
        """
        print(f"\n## {title}\n\n| what | {unit} (quartiles) |\n|---|---:|", flush=True)
        rows = []
        for name, numbers in values.items():
            low, median, high = quartiles(numbers)
            rows.append({"what": name, "median": median, "low": low, "high": high})
            print(f"| {name} | {median:.4g} ({low:.4g}-{high:.4g}) |")
        self.tables.append({"title": title, "unit": unit, "rows": rows})
        medians = {row["what"]: row["median"] for row in rows}
        goals = [
            {"goal": f"{name} <= {limit:g} {unit}", "wanted": limit, "reached": medians[name]}
            for name, limit in most.items()
        ]
        self.goals(goals, largest=True)

    def write(self, path: Path | None) -> None:
        """Write all of it as JSON."""
        self.about["load average at the end"] = load_average()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = {"question": self.question, "about": self.about, "tables": self.tables}
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def load_average() -> str:
    """Return the machine's load over 1, 5 and 15 minutes."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def cache_bytes() -> int:
    """Return the size of the largest CPU cache, 32 MiB where the system does not say."""
    sizes = [0]
    units = {"K": 1 << 10, "M": 1 << 20}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes) or 32 << 20


def _versions() -> str:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in found.items())


def describe(device: str) -> dict[str, Any]:
    """Describe machine, versions and command; paths are shortened to their last part."""
    # Their own place on the disk says nothing to others.
    arguments = [Path(a).name if os.sep in a else a for a in sys.argv]
    about = {
        "command": " ".join(arguments),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
        "CPU": _cpu_model(),
        "CPUs for this process": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "last-level cache": f"{cache_bytes() >> 20} MiB",
        "torch threads": torch.get_num_threads(),
        "versions": f"python {platform.python_version()}, {_versions()}",
        "system": f"{platform.system()} {platform.machine()}",
        "load average at the start": load_average(),
    }
    if device.startswith("cuda"):
        about["GPU"] = torch.cuda.get_device_name(torch.device(device))
    return about


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", type=Path, help="file to write the report to")
    result.add_argument("--quick", action="store_true", help="fewer and smaller cases, few rounds")
    result.add_argument("--rounds", type=int, help="of every contest")
    result.add_argument(
        "--seconds", type=float, help="that each contender runs per round, at least"
    )
    result.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("GPUPIPE_DATA", "data")),
        help="holds FashionMNIST/ and photos/ (default: $GPUPIPE_DATA, else ./data)",
    )
    return result


def effort(arguments: argparse.Namespace) -> Effort:
    """Return how long to measure."""
    rounds = arguments.rounds or (3 if arguments.quick else 11)
    seconds = 0.1 if arguments.quick else 0.4
    return Effort(rounds, seconds if arguments.seconds is None else arguments.seconds)
