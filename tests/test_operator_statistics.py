"""What operators draw, against torchvision's own ``get_params``: 100,000 samples each.

Every check is at ``statistics_checks.SIGMAS``; planted mistakes must fail the same checks.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import transforms as v1
from torchvision.transforms import v2

from gpupipe import draws
from gpupipe.draws import Draws
from gpupipe.operators import crop, registry, resize
from gpupipe.operators.lowered import Lowered
from gpupipe.tape import Tape
from tests.statistics_checks import close_share, same_counts, same_distribution, uniform_counts

COUNT = 100_000
THEIRS = 20_000
"""Samples of torchvision's, which draws one by one."""


def played(call: Any, height: int, width: int, count: int = COUNT) -> Tape:
    """Play one operator for many samples of one size."""
    lowered = registry.lower(call, itertools.count())
    assert isinstance(lowered, Lowered)
    size = np.full(count, height), np.full(count, width)
    tape = Tape(Draws(3, 0, np.arange(count)), *size, 3)
    lowered.play(tape, tape.everyone())
    return tape


def drawn(call: Any, height: int, width: int) -> dict[str, NDArray[np.int64]]:
    """Return what one operator drew for all samples."""
    tape = played(call, height, width)
    return dict(tape._records[-1][2])


def test_crops_are_uniform() -> None:
    """Every place of a RandomCrop, the last ones included, equally often."""
    params = drawn(v1.RandomCrop((20, 13)), 33, 50)
    assert uniform_counts(params["top"], 14)
    assert uniform_counts(params["left"], 38)
    together = params["top"] * 38 + params["left"]
    assert uniform_counts(together, 14 * 38)


@pytest.mark.parametrize("off", [-1, 1])
def test_an_off_by_one_in_a_range_is_seen(monkeypatch: pytest.MonkeyPatch, off: int) -> None:
    """A planted bug: the last place is left out, or one too many is there."""
    own = draws.integers
    monkeypatch.setattr(crop, "integers", lambda words, n: own(words, n + off))
    params = drawn(v1.RandomCrop((20, 13)), 33, 50)
    assert not uniform_counts(params["top"], 14)
    assert not uniform_counts(params["left"], 38)


SIZES = [(375, 500), (60, 41), (600, 20), (20, 600), (7, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 3.0)])
def test_resized_crops_are_distributed_as_torchvisions(
    size: tuple[int, int], ratio: tuple[float, float]
) -> None:
    """Heights, widths, places and the fallback of thin images."""
    transform = v1.RandomResizedCrop(32, ratio=ratio)
    ours = drawn(transform, *size)
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    rows = [v1.RandomResizedCrop.get_params(image, (0.08, 1.0), ratio) for _ in range(THEIRS)]
    theirs = np.array(rows)
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same_counts(ours[name], theirs[:, column]), name
    area = ours["height"] * ours["width"]
    assert same_distribution(area.astype(float), (theirs[:, 2] * theirs[:, 3]).astype(float))


def test_a_wrong_ratio_and_a_ninth_attempt_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs: an aspect ratio that is not logarithmic, and fewer attempts."""
    torch.manual_seed(0)
    image = torch.zeros(3, 20, 200)
    rows = [v1.RandomResizedCrop.get_params(image, (0.08, 1.0), (0.5, 3.0)) for _ in range(THEIRS)]
    theirs = np.array(rows)
    transform = v1.RandomResizedCrop(32, ratio=(0.5, 3.0))
    assert same_counts(drawn(transform, 20, 200)["width"], theirs[:, 3])
    monkeypatch.setattr(resize, "ATTEMPTS", 2)
    assert not same_counts(drawn(transform, 20, 200)["width"], theirs[:, 3])
    monkeypatch.undo()
    monkeypatch.setattr(resize, "exp", lambda x: 1 + x)
    assert not same_counts(drawn(transform, 20, 200)["width"], theirs[:, 3])


@pytest.mark.parametrize("size", [(224, 224), (60, 41), (9, 40)])
def test_erased_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Boxes where there are any, and how often there is none."""
    transform = v1.RandomErasing(p=1.0, scale=(0.02, 0.7), value=0)
    tape = played(transform, *size)
    _, where, params = tape._records[-1]
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    rows = [
        v1.RandomErasing.get_params(image, (0.02, 0.7), (0.3, 3.3), [0.0])[:4]
        for _ in range(THEIRS)
    ]
    theirs = np.array(rows)
    none = (theirs[:, 2] == size[0]) & (theirs[:, 3] == size[1])
    assert close_share(int((~where).sum()), COUNT, max(float(none.mean()), 1e-9)) or (
        abs((~where).mean() - none.mean()) < 0.01
    )
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same_counts(params[name][where], theirs[~none, column]), name


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_coins(p: float) -> None:
    """Flips, erasing and RandomApply happen as often as they should."""
    for call in (
        v1.RandomHorizontalFlip(p), v2.RandomVerticalFlip(p),
        v1.RandomApply([v1.Pad(1)], p), v2.RandomApply([v2.Pad(1)], p),
    ):  # fmt: skip
        hits = int(played(call, 30, 40)._records[-1][1].sum())
        assert close_share(hits, COUNT, p) if 0 < p < 1 else hits == COUNT * p


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
@pytest.mark.parametrize("module", [v1, v2])
def test_choices(module: Any, weights: list[float] | None) -> None:
    """Every child as often as its weight says, never two."""
    call = module.RandomChoice([module.Pad(n) for n in (1, 2, 3)], p=weights)
    chosen = np.stack([where for _, where, _ in played(call, 9, 9)._records])
    assert (chosen.sum(0) == 1).all()
    shares = np.array(weights or [1.0] * 3) / sum(weights or [1.0] * 3)
    for hits, share in zip(chosen.sum(1), shares, strict=True):
        assert close_share(int(hits), COUNT, float(share))


@pytest.mark.parametrize("module", [v1, v2])
def test_orders(module: Any) -> None:
    """All six orders of three children equally often."""
    call = module.RandomOrder([module.Pad(n) for n in (1, 2, 3)])
    records = played(call, 9, 9)._records  # place by place, child by child
    places = np.zeros((3, COUNT), np.int64)
    for number, (_, where, _) in enumerate(records):
        places[number // 3][where] = number % 3
    assert uniform_counts((places[0] * 9 + places[1] * 3 + places[2]) % 27, 27) is False
    codes = {5: 0, 7: 1, 11: 2, 15: 3, 19: 4, 21: 5}
    code = places[0] * 9 + places[1] * 3 + places[2]
    assert set(np.unique(code).tolist()) == set(codes)
    assert uniform_counts(np.vectorize(codes.get)(code), 6)


def test_operators_draw_apart() -> None:
    """Two flips of one pipeline are independent, and so are crop and flip."""
    ids = itertools.count()
    tape = Tape(Draws(0, 0, np.arange(COUNT)), np.full(COUNT, 9), np.full(COUNT, 9), 3)
    for _ in range(2):
        lowered = registry.lower(v1.RandomHorizontalFlip(), ids)
        assert isinstance(lowered, Lowered)
        lowered.play(tape, tape.everyone())
    first, second = (where for _, where, _ in tape._records)
    assert close_share(int((first & second).sum()), COUNT, 0.25)
