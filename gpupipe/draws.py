"""Random numbers as a pure function of (seed, epoch, index, position, view, operator, block).

Philox4x32-10 (Salmon et al., 2011): a counter in, four 32-bit words out, no state. Whatever order
samples are asked for in, on however many threads, ranks or devices, they get the same words.

The words become parameters by ``+ - * /``, ``sqrt`` and ``rint`` alone, each of which IEEE 754
defines to the last bit: the same on every machine.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

_STREAM = 0x73747265
"""Last counter word of the call that turns seed and epoch into a key: no sample has it."""

QUANTILES = 1 << 16
"""Levels of the normal distribution, see ``quantiles``."""


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return the ten-round Philox4x32 of counters.

    Args:
        counter: uint32 [N, 4].
        key: two 32-bit words.

    Returns:
        uint32 [N, 4].
    """
    x0, x1, x2, x3 = (counter[:, n].astype(np.uint64) for n in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (
            (second >> _SHIFT) ^ x1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _SHIFT) ^ x3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def _words(number: int) -> tuple[int, int]:
    return number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF


@cache
def _stream_key(seed: int, epoch: int) -> tuple[int, int]:
    """Return the key of an epoch."""
    counter = np.array([[*_words(epoch), _words(seed)[1], _STREAM]], np.uint32)
    drawn = philox(counter, (_words(seed)[0], _words(seed >> 64)[0]))
    return int(drawn[0, 0]), int(drawn[0, 1])


class Draws:
    """The random numbers of some samples of one epoch.

    Args:
        seed: any integer; 64 bits of it count.
        epoch: counted from 0.
        indices: int64 [N], of the dataset; below 2^48.
        positions: int64 [N] below 2^48 where an index may come twice in an epoch; None: 0.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        indices: NDArray[np.int64],
        positions: NDArray[np.int64] | None = None,
    ) -> None:
        self._key = _stream_key(seed & (1 << 64) - 1, epoch)
        self._indices = indices.astype(np.uint64)
        self._positions = (
            np.zeros(len(indices), np.uint64) if positions is None else positions.astype(np.uint64)
        )

        self._ready: dict[int, NDArray[np.uint32]] = {}

    def __len__(self) -> int:
        """Return N."""
        return len(self._indices)

    def prepare(self, operators: list[int]) -> None:
        """Make the first block of several operators in one call, which costs little more."""
        blocks = self._blocks([operator << 16 for operator in operators])
        self._ready.update(zip(operators, blocks, strict=True))

    def block(self, operator: int, block: int = 0, view: int = 0) -> NDArray[np.uint32]:
        """Return four words for each sample, uint32 [N, 4].

        Args:
            operator: its number in the pipeline, below 2^16.
            block: which four of the operator's words, below 256.
            view: which view of the image, below 256.
        """
        if not (block or view) and operator in self._ready:
            return self._ready[operator]
        words: NDArray[np.uint32] = self._blocks([operator << 16 | view << 8 | block])[0]
        return words

    def _blocks(self, streams: list[int]) -> NDArray[np.uint32]:
        """Return the words of some (operator, view, block), uint32 [len(streams), N, 4]."""
        counter = np.empty((len(streams), len(self._indices), 4), np.uint32)
        counter[:, :, 0] = self._indices & _LOW
        counter[:, :, 1] = self._positions & _LOW
        counter[:, :, 2] = np.array(streams, np.uint32)[:, None]
        counter[:, :, 3] = (self._indices >> _SHIFT) << np.uint64(16) | self._positions >> _SHIFT
        words: NDArray[np.uint32] = philox(counter.reshape(-1, 4), self._key)
        return words.reshape(counter.shape)


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return words as numbers in [0, 1) with 24 bits, as torch's float32 ``uniform_`` has."""
    result: NDArray[np.float64] = (words >> np.uint32(8)).astype(np.float64) * 2.0**-24
    return result


def integers(words: NDArray[np.uint32], n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return words as integers in [0, n), n >= 1: the high half of ``word * n``.

    The probabilities differ by at most n / 2^32 from each other's share.
    """
    product = words.astype(np.uint64) * n.astype(np.uint64)
    return (product >> _SHIFT).astype(np.int64)


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return e^x for ``|x|`` up to some tens, by ``+`` and ``*`` alone.

    ``e^x = (e^(x / 2^8))^(2^8)``, the inner one by its series; within 1e-13 of the exact value.
    """
    small = x / 256.0
    result = np.ones_like(small)
    for n in range(12, 0, -1):
        result = 1.0 + small / n * result
    for _ in range(8):
        result = result * result
    return result


@cache
def quantiles() -> NDArray[np.float32]:
    """Return the standard normal's quantiles at (k + 0.5) / 65536, float32 [65536]."""
    inverse = NormalDist().inv_cdf
    half = np.array([inverse((k + 0.5) / QUANTILES) for k in range(QUANTILES // 2)])
    return np.concatenate([half, -half[::-1]]).astype(np.float32)
