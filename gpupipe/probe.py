"""Proof that a dataset's transform can be lifted: a few samples, read in a forked child.

The child works on a copy of the dataset in which recorders stand in the transforms' places. Nothing
of the dataset runs in the parent: its generators, its caches and the offsets of its open files are
what they were, whatever the child does, be it to crash or to block for ever.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import itertools
import json
import logging
import math
import os
import select
import signal
import stat
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpupipe import trees
from gpupipe.fetching import HOLE, examine, is_batched, read
from gpupipe.images import ImageKind
from gpupipe.places import Place, graph, install, places
from gpupipe.recorder import Recorder, Session
from gpupipe.sentinel import Call, Sentinel, Transform

with suppress(ImportError):  # Windows, where there is no fork either and nothing is probed
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Split = tuple[Transform | None, Transform | None]
"""The prefix (None: there is none) and the suffix (None: it is all) of a place's transform."""

_SAMPLES = 5
_LONGEST_TEXT = 300


@dataclass(frozen=True)
class Verdict:
    """What the probe found.

    Attributes:
        ok: Whether the transform at ``place`` can be lifted from every probed sample.
        reason: What was proved, or what the dataset does that stands against it; a sentence.
        place: The one place whose transform makes the image; None if there is no such.
        path: Where in a sample the image lies.
        kinds: What each probed image was when it reached the suffix.
        sizes: Height and width of each, in pixels.
        views: Calls of a transform per sample; 0 if that differs or was not seen.
    """

    ok: bool
    reason: str
    place: Place | None = None
    path: trees.Path = ()
    kinds: tuple[ImageKind, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    views: int = 0


def probe(
    dataset: Any,
    candidates: Sequence[Place] | None = None,
    indices: Sequence[int] | None = None,
    *,
    splits: Mapping[Place, Split] | None = None,
    timeout: float = 20.0,
) -> Verdict:
    """Try on a few samples whether the dataset's transform can be lifted.

    Args:
        dataset: A map-style dataset; nothing of it runs in this process.
        candidates: The places to watch; None for all of ``places(dataset)``.
        indices: The samples to read, each of them twice; None for the first, the last and three
            between.
        splits: Prefix and suffix of the transforms; one that is not named is suffix throughout.
        timeout: Seconds after which the child is killed.

    Raises:
        OSError: The system has no process or no descriptor left.
    """
    candidates = places(dataset) if candidates is None else tuple(candidates)
    if not candidates:
        return Verdict(
            ok=False,
            reason=f"{type(dataset).__name__} holds no torchvision transform in any attribute",
        )
    if not hasattr(os, "fork") or not hasattr(os, "waitid"):
        return Verdict(ok=False, reason="no fork on this platform, so nothing can be tried safely")
    message, ending = _in_child(_Trial(dataset, candidates, indices, splits or {}), timeout)
    if message is None:
        return Verdict(ok=False, reason=f"{type(dataset).__name__}: {ending}")
    fields = json.loads(message)
    number = fields.pop("place")
    return Verdict(
        **fields
        | {
            "place": None if number is None else candidates[number],
            "path": tuple(fields["path"]),
            "kinds": tuple(ImageKind(**kind) for kind in fields["kinds"]),
            "sizes": tuple((height, width) for height, width in fields["sizes"]),
        }
    )


@dataclass
class _Refused(Exception):  # noqa: N818 # an answer, not an error
    """Ends a trial; the text is the verdict's reason."""

    reason: str


@dataclass
class _Trial:
    """What the child does; ``run`` is called there and nowhere else."""

    dataset: Any
    candidates: Sequence[Place]
    indices: Sequence[int] | None
    splits: Mapping[Place, Split]
    views: int = 0

    def run(self) -> str:
        """Try, and return a verdict as JSON, the place by its number."""
        try:
            verdict = self._verdict()
        except _Refused as refused:
            verdict = Verdict(ok=False, reason=refused.reason, views=self.views)
        except BaseException as error:  # noqa: BLE001 # a dataset may call sys.exit
            verdict = Verdict(ok=False, reason=f"{self._name()}: {_text(error)}")
        fields = dataclasses.asdict(dataclasses.replace(verdict, place=None))
        if verdict.place is not None:
            fields["place"] = [place is verdict.place for place in self.candidates].index(True)
        return json.dumps(fields)

    def _name(self, place: Place | None = None) -> str:
        """The class to name: the one that holds the transform, if only one does."""
        owners = {place.owner} if place else {place.owner for place in self.candidates}
        plain = {"StandardTransform"} & owners
        return owners.pop() if len(owners) == 1 and not plain else type(self.dataset).__name__

    def _verdict(self) -> Verdict:
        session = Session()
        recorders = {
            place: Recorder(place, session, *self.splits.get(place, (None, None)))
            for place in self.candidates
        }
        copied = install(self.dataset, recorders)
        batched = is_batched(self.dataset)
        indices = self._spread() if self.indices is None else list(self.indices)
        units = [indices] if batched else [[index] for index in indices]
        seen: list[tuple[Any, trees.Path, Call]] = []
        for unit in units * 2:  # twice each: a cache answers the second time
            seen += self._try(copied, session, unit, batched=batched)
        return self._conclude(seen, len(indices))

    def _spread(self) -> list[int]:
        """The first, the last and some between."""
        count = len(self.dataset)
        if not count:
            raise _Refused(f"{type(self.dataset).__name__} is empty")
        steps = _SAMPLES - 1
        return sorted({(count - 1) * step // steps for step in range(_SAMPLES)})

    def _try(
        self, copied: Any, session: Session, unit: list[Any], *, batched: bool
    ) -> list[tuple[Any, trees.Path, Call]]:
        """Read one unit of samples and see that nothing but the sample holds the image."""
        where = f"{self._name()} (index {', '.join(map(str, unit[:3]))})"
        self.views = 0
        with session.recording() as calls:
            try:
                samples = read(copied, unit, batched=batched)
            except BaseException as error:  # noqa: BLE001 # a dataset may call sys.exit
                raise _Refused(f"{where} raises {_text(error)}{_before(calls)}") from None
        self.views = len(calls) // len(unit) if len(calls) % len(unit) == 0 else 0
        found, reason = examine(samples, calls, len(unit))
        if reason:
            raise _Refused(f"{where} {reason}")
        for sample, (path, _) in zip(samples, found, strict=True):
            try:
                trees.fill(sample, path, HOLE, copied=True)
            except Exception as error:  # noqa: BLE001 # containers of the user's
                raise _Refused(
                    f"{where} returns a sample that cannot be rebuilt: {_text(error)}"
                ) from None
        del samples, sample
        if any(call.alive() is not None for call in calls):
            gc.collect()
        if any(call.alive() is not None for call in calls):
            raise _Refused(f"{self._keeper(copied)}")
        return [(index, path, call) for index, (path, call) in zip(unit, found, strict=True)]

    def _keeper(self, copied: Any) -> str:
        """Say who still holds a sentinel."""
        for node in graph(copied).values():
            for name, value in (
                vars(node.value) if hasattr(node.value, "__dict__") else {}
            ).items():
                nodes = itertools.islice(trees.walk(value), 100_000)
                if any(type(kept) is Sentinel for _, kept in nodes):
                    return f"{type(node.value).__name__} keeps transformed samples (in .{name})"
        return f"{self._name()} keeps transformed samples"

    def _conclude(self, seen: list[tuple[Any, trees.Path, Call]], count: int) -> Verdict:
        """All samples were as they should be; they must also be alike."""
        index, path, call = seen[0]
        for other, other_path, other_call in seen:
            if other_call.place is not call.place:
                raise _Refused(
                    f"{self._name()} transforms samples at different places: {call.place} for "
                    f"index {index}, {other_call.place} for index {other}; expected one for all"
                )
            if other_path != path:
                raise _Refused(
                    f"{self._name()} returns the image at {trees.show(path)} for index {index} and "
                    f"at {trees.show(other_path)} for index {other}; expected one place for all"
                )
        calls = [call for _, _, call in seen[:count]]
        return Verdict(
            ok=True,
            reason=f"{count} samples, each read twice: the image is {trees.show(path)}",
            place=call.place,
            path=path,
            kinds=tuple(call.kind for call in calls if call.kind is not None),
            sizes=tuple(call.size for call in calls),
            views=1,
        )


def _before(calls: Sequence[Call]) -> str:
    """What preceded an exception and may explain it."""
    for call in calls:
        if call.touched:
            return f", after it touched the transformed image ({call.touched})"
        if call.passed:
            return f", after it called the transform {call.place} with {call.passed}"
    return ""


def _text(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _in_child(trial: _Trial, timeout: float) -> tuple[str | None, str]:
    """Run ``trial`` in a forked child; return what it wrote, or None and how it ended."""
    receiving, sending = os.pipe()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns where other threads run: the child may wait for a lock that one of
            # them held. It is killed then.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _child(trial, sending, timeout)
        os.close(sending)
        sending = -1
        return _await(pid, receiving, timeout)
    finally:
        os.close(receiving)
        if sending >= 0:
            os.close(sending)


def _child(trial: _Trial, sending: int, timeout: float) -> None:
    """Run ``trial`` in this process, which has just been forked, and end it."""
    status = 1
    try:
        _isolate(sending, timeout)
        message = trial.run().encode() + b"\n"
        while message:
            message = message[os.write(sending, message) :]
        status = 0
    finally:
        os._exit(status)  # no exit handlers, no flushing of the parent's buffers


def _isolate(sending: int, timeout: float) -> None:
    """Leave nothing that this process does visible to the parent or the terminal."""
    os.setsid()  # with children of its own it can be killed as one group; Ctrl-C is the parent's
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.alarm(math.ceil(timeout) + 5)  # should the parent be killed meanwhile
    faulthandler.disable()
    logging.disable()
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stdout
    with suppress(OSError):
        _own_offsets(except_for=sending)
    torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
    gc.freeze()  # a collection here need not look at what the parent has


def _own_offsets(except_for: int) -> None:
    """Open every regular file anew: a read here must not move the offset that the parent has.

    Only where there is ``/proc``, so on Linux.
    """
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        descriptor = int(name)
        with suppress(OSError):
            if descriptor == except_for or not stat.S_ISREG(os.fstat(descriptor).st_mode):
                continue
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~(os.O_CREAT | os.O_TRUNC | os.O_EXCL)
            own = os.open(Path("/proc/self/fd") / name, flags)
            os.lseek(own, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(own, descriptor, inheritable=os.get_inheritable(descriptor))
            os.close(own)


def _await(pid: int, receiving: int, timeout: float) -> tuple[str | None, str]:
    """Read the child's line, then end and reap it; None and how it ended if there is no line."""
    received, deadline = b"", time.monotonic() + timeout
    poller = select.poll()
    poller.register(receiving, select.POLLIN)
    ended = False
    try:
        while not received.endswith(b"\n") and time.monotonic() < deadline:
            if poller.poll(20):  # ms; a grandchild may hold the pipe open, so look at both
                chunk = os.read(receiving, 1 << 16)
                received += chunk
                if chunk:
                    continue
                poller.unregister(receiving)
            if ended:
                break
            ended = _has_ended(pid)
    finally:
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        code = _reap(pid)
    if received.endswith(b"\n"):
        return received.decode(), ""
    if not ended:
        return None, f"reading a few samples took longer than {timeout:g} s"
    if code is not None and code < 0:
        return None, f"reading a few samples was ended by {signal.Signals(-code).name}"
    return None, f"reading a few samples ended the process with exit code {code}"


def _has_ended(pid: int) -> bool:
    """Whether the child has ended; it is not reaped, so that its number stays its own."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _reap(pid: int) -> int | None:
    """Exit code of the child, negative for a signal; None where SIGCHLD is ignored."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None
