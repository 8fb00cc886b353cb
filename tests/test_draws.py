"""Random numbers: the published Philox, streams that never meet, draws that no order changes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpupipe.draws import Draws, exp, integers, philox, quantiles, uniform
from tests.statistics_checks import same_distribution, uniform_counts

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers of Random123's ``kat_vectors`` for philox4x32-10."""
    assert philox(np.array([counter], np.uint32), key).tolist() == [list(expected)]


def test_no_two_streams_share_a_block() -> None:
    """Seed, epoch, index, position, operator, view and block each change every word."""
    seen: set[tuple[int, ...]] = set()
    count = 0
    indices = np.array([0, 1, 2**32, 2**40 + 5])
    for seed in (0, 1, 2**32, -1):
        for epoch in (0, 1, 2**33):
            for positions in (None, np.full(4, 1), np.full(4, 2**33)):
                draws = Draws(seed, epoch, indices, positions)
                for operator, block, view in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
                    seen.update(map(tuple, draws.block(operator, block, view).tolist()))
                    count += 4
    assert len(seen) == count


def test_blocks_do_not_depend_on_the_company() -> None:
    """A sample draws the same alone, in a batch, in another order, and prepared ahead."""
    indices = np.array([7, 3, 2**35, 11])
    together = Draws(5, 2, indices)
    prepared = Draws(5, 2, indices)
    prepared.prepare([0, 4, 2])
    backwards = Draws(5, 2, indices[::-1])
    for operator in (0, 2, 4):
        expected = together.block(operator)
        assert np.array_equal(prepared.block(operator), expected)
        assert np.array_equal(backwards.block(operator)[::-1], expected)
        for n, index in enumerate(indices):
            assert np.array_equal(Draws(5, 2, np.array([index])).block(operator)[0], expected[n])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 57, 256])
def test_integers_are_uniform_and_an_off_by_one_is_seen(n: int) -> None:
    """Chi-square on 100,000 draws; a range one too large or too small fails the same check."""
    words = Draws(0, 0, np.arange(100_000)).block(0)[:, 1]
    assert uniform_counts(integers(words, np.full(len(words), n)), n)
    assert not uniform_counts(integers(words, np.full(len(words), n + 1)), n)
    if n > 1:
        assert not uniform_counts(integers(words, np.full(len(words), n - 1)), n)


def test_uniform_is_torchs_grid() -> None:
    """24 bits in [0, 1): every value is a float32, as torch's ``uniform_`` gives."""
    drawn = uniform(np.array([0, 255, 256, ONES], np.uint32))
    assert drawn.tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


def test_exp_is_exponential() -> None:
    """Within 1e-12 of the C library's over all logarithms of aspect ratios."""
    x = np.linspace(-8, 8, 1001)
    expected = np.array([math.exp(v) for v in x])
    assert np.abs(exp(x) / expected - 1).max() < 1e-12


def test_noise_is_normal() -> None:
    """Kolmogorov-Smirnov of 100,000 quantiles against NumPy's normal; a wider one is refused."""
    words = Draws(0, 0, np.arange(25_000)).block(3).reshape(-1)
    drawn = quantiles()[words >> np.uint32(16)].astype(np.float64)
    normal = np.random.default_rng(0).standard_normal(100_000)
    assert same_distribution(drawn, normal)
    assert not same_distribution(drawn * 1.08, normal)
