"""The benchmarks run, write JSON, and refuse a contender that computes something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import (
    Contender,
    Effort,
    Report,
    WrongResultError,
    compare,
    measure,
    quartiles,
)

ROOT = Path(__file__).parent.parent


def run(module: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark on very little work; return its report."""
    path = folder / "report.json"
    short = ("--quick", "--rounds", "1", "--seconds", "0.001", "--data", str(folder))
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *short, "--json", str(path), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


@pytest.mark.slow
def test_bench_normalize_reports_every_contender_with_its_bits(tmp_path: Path) -> None:
    """Odd sizes, so that the kernel's tail is checked too; photos are absent and skipped."""
    sizes = ("--batch", "3", "--height", "13", "--width", "17", "--no-compile")
    report = run("bench_normalize", tmp_path, *sizes, "--channels", "1", "3", "4")
    contests = [table for table in report["tables"] if "noise" in table["title"]]
    assert len(contests) == 3 * (1 + 2 + 2)
    for table in contests:
        rows = {row["contender"]: row for row in table["rows"]}
        assert rows["gpupipe"]["bits"] == "same bits"
        assert rows["gpupipe"]["of_limit"] > 0
    assert str(tmp_path) not in json.dumps(report)


@pytest.mark.slow
def test_bench_loader_reports_every_workload(tmp_path: Path) -> None:
    """Without data it says that it draws noise."""
    report = run("bench_loader", tmp_path, "--images", "40")
    titles = " ".join(table["title"] for table in report["tables"])
    for part in ("noise of Fashion-MNIST", "CIFAR-10", "224x224x3", "Python per batch", "first"):
        assert part in titles
    rows = [row for table in report["tables"] for row in table["rows"] if "contender" in row]
    assert {row["bits"] for row in rows} == {"same bits", "limit"}
    assert {"CPU", "versions", "command", "date"} <= report["about"].keys()
    assert any("goals" in table for table in report["tables"])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_bench_loader_runs_on_a_gpu(tmp_path: Path) -> None:
    """The bus, the host's gather and the cached dataset are measured too."""
    report = run("bench_loader", tmp_path, "--device", "cuda", "--images", "40")
    names = {row.get("contender") for table in report["tables"] for row in table["rows"]}
    assert {"gpupipe", "pinned copy", "gather by torch", "plain torch on the device"} <= names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: torch.nextafter(x, x + 1), "differs"),
        (lambda x: x + float("nan"), "differs"),
        (lambda x: x.flip(0), "differs"),
        (lambda x: x[:-1], "torch.float32"),
        (lambda x: x.double(), "torch.float64"),
        (lambda x: x.contiguous(memory_format=torch.channels_last), "strides"),
    ],
)
def test_a_contender_that_computes_something_else_is_not_timed(wrong: Any, message: str) -> None:
    """One differing bit, NaN, another order, count, dtype or layout: each is an error."""
    wanted = torch.rand(4, 3, 5, 7)
    report = Report("?", {})
    cheat = Contender("cheat", lambda: pytest.fail("timed"), lambda: [wrong(wanted)])
    with pytest.raises(WrongResultError, match=message):
        report.contest("planted", [cheat], [wanted], Effort(1, 0.0), item_bytes=1)
    assert not report.tables


def test_rounding_is_stated_where_it_is_accepted() -> None:
    """A tolerance turns a difference into a sentence, never into "same bits"."""
    wanted = torch.rand(4, 3, 5, 7)
    assert compare("same", [wanted.clone()], [wanted]) == "same bits"
    assert "100.0% differ" in compare("near", [wanted + 1e-3], [wanted], tolerance=2e-3)
    with pytest.raises(WrongResultError, match="0 tensors"):
        compare("empty", [], [wanted])


def test_contenders_take_turns() -> None:
    """Each runs in every round, after what is not timed, and one round is not counted."""
    seen: list[str] = []

    def contender(name: str) -> Contender:
        def run_once() -> tuple[int, None]:
            seen.append(name)
            return 10, None

        return Contender(name, run_once, None, prepare=lambda: seen.append(f"{name} prepared"))

    rates = measure([contender("a"), contender("b")], Effort(rounds=3, seconds=1e-9))
    assert {name: len(each) for name, each in rates.items()} == {"a": 3, "b": 3}
    assert seen.count("a") == seen.count("a prepared") == 4
    for turn in range(4):
        assert {name[0] for name in seen[4 * turn : 4 * turn + 4]} == {"a", "b"}


def test_quartiles_of_one_round() -> None:
    """A single round has no spread."""
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
