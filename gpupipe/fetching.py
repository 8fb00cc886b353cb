"""Samples with the raw image taken out, from a dataset whose lifting has been proved.

The recorder stays for every sample. A sample is lifted if exactly one sentinel came back, untouched
and where the probe found it; any other is fetched again from the user's own dataset, with the
generators of ``random``, NumPy and torch as they were before it.
"""

from __future__ import annotations

import gc
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset

from gpupipe import trees
from gpupipe.places import Place, install
from gpupipe.recorder import Recorder, Session
from gpupipe.rng import RngState
from gpupipe.sentinel import Call, Raw, Sentinel, Transform, call_of, heal

if TYPE_CHECKING:
    from collections.abc import Sequence

HOLE = 0
"""What is left in a sample where its image was; an int, so that ``default_collate`` takes it."""


def is_batched(dataset: Any) -> bool:
    """Whether torch's loader would read whole batches by a ``__getitems__`` of the user's.

    ``Subset``'s own is seen through, for it reads sample by sample unless what it wraps has one.

    Args:
        dataset: A map-style dataset.
    """
    while True:
        method = getattr(dataset, "__getitems__", None)
        if not callable(method):
            return False
        if getattr(method, "__func__", None) is not Subset.__getitems__:
            return True
        dataset = method.__self__.dataset


def read(dataset: Any, indices: Sequence[Any], *, batched: bool) -> list[Any]:
    """Read samples by the method that torch's loader uses.

    Args:
        dataset: A map-style dataset.
        indices: What to read.
        batched: What ``is_batched`` says of it.

    Raises:
        Exception: What the dataset raises.
    """
    if batched:
        return list(dataset.__getitems__(list(indices)))
    return [dataset[index] for index in indices]


def examine(
    samples: Sequence[Any], calls: Sequence[Call], count: int
) -> tuple[list[tuple[trees.Path, Call]], str]:
    """Find the one sentinel of every sample.

    Args:
        samples: What the dataset returned.
        calls: Every call of a recorder meanwhile.
        count: Number of samples that were asked for.

    Returns:
        Path and call for each sample, or none and what the dataset did, as the end of a sentence
        that begins with its name.

    Raises:
        Exception: What a user's mapping raises while it is listed.
    """
    reason = _misuse(samples, calls, count)
    if reason:
        return [], reason
    found: list[tuple[trees.Path, Call]] = []
    for sample in samples:
        hits = [(path, node) for path, node in trees.walk(sample) if type(node) is Sentinel]
        if not hits:
            return [], (
                "does not return the transformed image itself in the sample (a tuple, list, dict, "
                "namedtuple or dataclass)"
            )
        if len(hits) > 1:
            at = " and ".join(trees.show(path) for path, _ in hits)
            return [], f"returns the same image more than once: it appears at {at}"
        found.append((hits[0][0], call_of(hits[0][1])))
    if {id(call) for _, call in found} != {id(call) for call in calls}:
        return [], "returns an image that belongs to another sample"
    return found, ""


def _misuse(samples: Sequence[Any], calls: Sequence[Call], count: int) -> str:
    """What the calls alone show to be wrong."""
    names = sorted({str(call.place) for call in calls})
    views = len(calls) / count
    reason = ""
    if touched := [call.touched for call in calls if call.touched]:
        reason = f"touches the transformed image ({touched[0]})"
    elif passed := [call for call in calls if call.passed]:
        reason = f"calls the transform {passed[0].place} with {passed[0].passed}"
    elif len(samples) != count:
        reason = f"returns {len(samples)} samples when asked for {count}"
    elif not calls:
        reason = "returns a sample without calling the transform (a cache, or a condition?)"
    elif not views.is_integer():
        reason = f"calls the transform {len(calls)} times for {count} samples"
    elif views > 1:
        how = f"{views:.0f} calls of the transform {names[0]}"
        if len(names) > 1:
            how = f"the places {', '.join(names)} each apply a transform"
        reason = f"has {views:.0f} views per sample ({how}); lifting views is not done yet"
    return reason


class LiftedFetcher:
    """Fetches samples with the image taken out, raw.

    The copy of the dataset is made here, so make a fetcher for every pass: it sees what the user
    has changed since the last. As in a worker process, what ``__getitem__`` writes into ``self``
    stays in the copy. One thread at a time may fetch if the dataset draws random numbers.

    Args:
        dataset: The user's map-style dataset; it is not changed.
        place: Where the transform stands, from ``places(dataset)``.
        path: Where in a sample the image lies, from the probe.
        prefix: The part of the transform that stays on the CPU; None if there is none.
        suffix: The rest, which draws no random numbers and gives the tensor; None if it is all.

    Attributes:
        deviations: Number of samples so far that were not lifted.
        path: Where in a sample the image lies.
        reasons: The deviations, by what the dataset did.
        keeps_samples: Whether the dataset was seen to keep transformed samples. What it kept is
            what torchvision would have given, but lifting should stop.

    Raises:
        InputError: The dataset cannot be copied, or does not hold the transform any more.
    """

    def __init__(
        self,
        dataset: Any,
        place: Place,
        path: trees.Path,
        *,
        prefix: Transform | None = None,
        suffix: Transform | None = None,
    ) -> None:
        self.deviations = 0
        self.reasons: Counter[str] = Counter()
        self.keeps_samples = False
        self._dataset = dataset
        self.path = path
        self._suffix = suffix or place.transform
        self._session = Session()
        recorder = Recorder(place, self._session, prefix, suffix)
        self._copy = install(dataset, {place: recorder})
        self._batched = is_batched(dataset)

    def fetch(self, indices: Sequence[Any]) -> list[tuple[Any, Raw | None]]:
        """Fetch samples in order.

        Args:
            indices: As torch's loader would hand them to the dataset.

        Returns:
            For each index the sample and its raw image, with ``HOLE`` in the image's place; or the
            complete sample, as the dataset itself gives it, and None.

        Raises:
            Exception: What the dataset raises.
        """
        units = [list(indices)] if self._batched else [[index] for index in indices]
        fetched: list[tuple[Any, Raw | None]] = []
        calls: list[Call] = []
        try:
            for unit in units:
                fetched += self._fetch_unit(unit, calls)
        finally:
            self._heal(calls)
        return fetched

    def complete(self, sample: Any, raw: Raw | None) -> Any:
        """Return a fetched sample with its image transformed, as the dataset gives it.

        Args:
            sample: From ``fetch``; it is not changed.
            raw: Its companion; with None the sample is complete already.

        Raises:
            Exception: What the suffix raises for this image.
        """
        if raw is None:
            return sample
        return trees.fill(sample, self.path, self._suffix(raw), copied=True)

    def _fetch_unit(self, unit: list[Any], seen: list[Call]) -> list[tuple[Any, Raw | None]]:
        """Fetch what is read by one call of the dataset; note its calls in ``seen``."""
        if not unit:
            return []
        before = RngState.now()
        try:
            with self._session.recording() as calls:
                samples = read(self._copy, unit, batched=self._batched)
            pairs, reason = self._take(samples, calls, len(unit))
        except Exception as error:  # noqa: BLE001 # the dataset itself decides what it raises
            samples, pairs, reason = [], [], f"raises {type(error).__name__}"
        seen += calls
        if not reason:
            return pairs
        self.deviations += len(unit)
        self.reasons[reason] += len(unit)
        own = len(samples) == len(unit) and bool(calls)
        if own and all(call.passed and not call.touched for call in calls):
            return [(sample, None) for sample in self._cleared(samples)]
        del samples
        before.restore()
        samples = read(self._dataset, unit, batched=self._batched)
        return [(sample, None) for sample in self._cleared(samples)]

    def _take(
        self, samples: list[Any], calls: list[Call], count: int
    ) -> tuple[list[tuple[Any, Raw | None]], str]:
        """Take the raw images out of samples that are as the probe found them."""
        found, reason = examine(samples, calls, count)
        if not reason and any(path != self.path for path, _ in found):
            reason = f"returns the image elsewhere than at {trees.show(self.path)}"
        if reason:
            return [], reason
        holed = [trees.fill(sample, self.path, HOLE, copied=True) for sample in samples]
        return [(hole, call.raw) for hole, (_, call) in zip(holed, found, strict=True)], ""

    def _cleared(self, samples: list[Any]) -> list[Any]:
        """Heal what a cache may have put into samples of the user's own dataset."""
        for sample in samples:
            for _, node in trees.walk(sample):
                if type(node) is Sentinel:
                    self.keeps_samples = True
                    heal(node)
        return samples

    def _heal(self, calls: list[Call]) -> None:
        """Make what somebody still holds of these calls real."""
        if any(call.alive() is not None for call in calls):
            gc.collect()  # it may hang in a cycle that nobody holds
        for call in calls:
            sentinel = call.alive()
            if sentinel is not None:
                self.keeps_samples = True
                heal(sentinel)
