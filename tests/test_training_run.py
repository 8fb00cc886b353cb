"""What training loops do to a loader: all of it ends with torch's batches and nothing left over."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms as T  # noqa: N812 # as everyone writes it

import gpupipe

TRANSFORM = T.Compose([T.ToTensor(), T.Normalize((0.3,), (0.2,))])
COUNT = 203  # a last partial batch for 16 and for 10


class Own(Dataset[Any]):
    """A dataset with its own ``__getitem__``: the recorded route."""

    def __init__(self, count: int = COUNT) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, 9, 7), np.uint8)
        self.transform = TRANSFORM

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), index


def arrays(count: int = COUNT) -> gpupipe.ArrayDataset:
    """Return a dataset for the array route."""
    images = np.random.default_rng(0).integers(0, 256, (count, 9, 7), np.uint8)
    return gpupipe.ArrayDataset(images, np.arange(count), transform=TRANSFORM)


DATASETS: dict[str, Callable[[], Any]] = {"arrays": arrays, "own": Own}
Pair = tuple[gpupipe.DataLoader[Any], TorchDataLoader[Any]]


@pytest.fixture(params=sorted(DATASETS))
def dataset(request: pytest.FixtureRequest) -> Any:
    """Give each route."""
    return DATASETS[request.param]()


def pair(dataset: Any, batch_size: int = 16, **arguments: Any) -> Pair:
    """Return gpupipe's and torch's loader with equal generators."""
    return (
        gpupipe.DataLoader(
            dataset,
            batch_size,
            generator=torch.Generator().manual_seed(3),
            device="cpu",
            **arguments,
        ),
        TorchDataLoader(
            dataset, batch_size, generator=torch.Generator().manual_seed(3), **arguments
        ),
    )


def same(mine: Any, their: Any) -> bool:
    """Say whether two batches have equal types, shapes and bits."""
    return type(mine) is type(their) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, their, strict=True)
    )


def all_same(mine: Iterable[Any], their: Iterable[Any]) -> bool:
    """Say whether all batches are equal, and as many."""
    return all(same(a, b) for a, b in zip(mine, their, strict=True))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 10, 16, COUNT, COUNT + 1])
def test_epochs(dataset: Any, batch_size: int, drop_last: bool) -> None:
    """Three shuffled epochs are torch's, whatever the batch size."""
    if batch_size > COUNT and drop_last:
        pytest.skip("no batch")
    ours, theirs = pair(dataset, batch_size, shuffle=True, drop_last=drop_last)
    for _ in range(3):
        assert all_same(ours, theirs)
    assert len(ours) == len(theirs)


def test_break_and_go_on(dataset: Any) -> None:
    """An early break leaves the next epochs as torch's."""
    ours, theirs = pair(dataset, shuffle=True)
    for stop in (1, 4, 0):
        for number, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
            assert same(mine, their)
            if number == stop:
                break
    assert all_same(ours, theirs)


def test_exception_in_the_loop(dataset: Any) -> None:
    """An exception in the training step is the user's, and the loader goes on after it."""
    ours, theirs = pair(dataset, shuffle=True)

    def step(loader: Iterable[Any]) -> None:
        for _ in loader:
            raise ZeroDivisionError

    for loader in (ours, theirs):
        with pytest.raises(ZeroDivisionError):
            step(loader)
    assert all_same(ours, theirs)


def test_two_loaders_interleaved(dataset: Any) -> None:
    """Two loaders over one dataset do not disturb each other."""
    ours, theirs = pair(dataset, 16, shuffle=True)
    other, reference = pair(dataset, 10)
    pairs = zip(zip(ours, other, strict=False), zip(theirs, reference, strict=False), strict=True)
    for mine, their in pairs:
        assert same(mine[0], their[0])
        assert same(mine[1], their[1])


def test_nested_iteration(dataset: Any) -> None:
    """One loader can be iterated within its own loop."""
    ours, theirs = pair(dataset, 64, shuffle=True)
    for mine, their in zip(ours, theirs, strict=True):
        assert all_same(ours, theirs)
        assert same(mine, their)


def test_two_iterators_turn_by_turn(dataset: Any) -> None:
    """Two iterators of one loader advance independently."""
    ours, theirs = pair(dataset, shuffle=True)
    mine, their = (iter(ours), iter(ours)), (iter(theirs), iter(theirs))
    for a, b, x, y in zip(*mine, *their, strict=True):
        assert same(a, x)
        assert same(b, y)


def test_old_batches_stay(dataset: Any) -> None:
    """Batches that are kept for epochs are never written again."""
    ours, theirs = pair(dataset, shuffle=True)
    kept = [batch for _ in range(4) for batch in ours]
    assert all_same(kept, [batch for _ in range(4) for batch in theirs])
    starts = {images.data_ptr() for images, _ in kept}
    assert len(starts) == len(kept)


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "slice": lambda images: images[3:5],
    "one pixel": lambda images: images[0, 0, 0, 0],
    "detach": torch.Tensor.detach,
    "numpy": torch.Tensor.numpy,
    "numpy slice": lambda images: images.numpy()[1:, ..., ::2],
    "storage": torch.Tensor.untyped_storage,
    "permute": lambda images: images.permute(1, 0, 3, 2),
    "memoryview": lambda images: images.numpy().data,
    "dlpack": torch.utils.dlpack.from_dlpack,
    "data": lambda images: images.data,
    "as bytes": lambda images: images.view(torch.uint8),
}


def _values(view: Any) -> bytes:
    if isinstance(view, torch.Tensor):
        return view.contiguous().numpy().tobytes()
    return bytes(view) if isinstance(view, (memoryview, torch.UntypedStorage)) else view.tobytes()


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_views_stay(dataset: Any, name: str) -> None:
    """A view keeps its batch's memory, when the batch itself is gone."""
    ours, _ = pair(dataset)
    kept, values = [], []
    for images, _ in ours:
        kept.append(VIEWS[name](images))
        values.append(_values(kept[-1]))
    del images
    for _ in range(3):
        for images, _ in ours:
            images.fill_(-7)
    assert [_values(view) for view in kept] == values


def test_views_in_graphs_stay(dataset: Any) -> None:
    """What autograd saved for a backward pass is not overwritten by later batches."""
    ours, theirs = pair(dataset)
    gradients = []
    for loader in (ours, theirs):
        weight = torch.ones(1, 1, 9, 7, requires_grad=True)
        losses = [(images * weight).sin().sum() for images, _ in loader]
        losses = [loss for loss in losses for _ in [list(ours)]]
        gradients.append(torch.autograd.grad(sum(losses, torch.zeros(())), weight)[0])
    assert torch.equal(*gradients)


def test_batches_may_be_changed(dataset: Any) -> None:
    """In-place ops on a batch change neither the dataset nor later batches."""
    ours, theirs = pair(dataset, shuffle=True)
    for _ in range(2):
        for mine, their in zip(ours, theirs, strict=True):
            assert same(mine, their)
            mine[0].zero_()
            mine[1].fill_(-1)


def test_loader_deleted_while_iterating(dataset: Any) -> None:
    """The iterator goes on without its loader."""
    ours, theirs = pair(dataset, shuffle=True)
    expected, batches = list(theirs), iter(ours)
    first = next(batches)
    del ours
    gc.collect()
    assert all_same([first, *batches], expected)


def test_exhausted_iterator_stays_so(dataset: Any) -> None:
    """After its end, ``next()`` raises StopIteration again and again."""
    batches = iter(pair(dataset)[0])
    assert len(list(batches)) == -(-COUNT // 16)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],  # noqa: S301
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(dataset: Any, again: Callable[[Any], Any], begun: bool) -> None:
    """A copy of a loader, also of one in use, gives torch's batches."""
    ours, theirs = pair(dataset)
    held = iter(ours)
    if begun:
        next(held)
    assert all_same(again(ours), theirs)
    assert all_same(ours, theirs)


def test_beside_torch_workers(dataset: Any) -> None:
    """Forked workers run while our threads are at work."""
    ours, theirs = pair(dataset, shuffle=True)
    expected = list(theirs)
    theirs.generator.manual_seed(3)
    beside = TorchDataLoader(dataset, 16, num_workers=2)
    for mine, their, _ in zip(ours, expected, beside, strict=True):
        assert same(mine, their)


def test_within_torch_worker() -> None:
    """A forked process that inherited a used loader can use it."""
    ours, theirs = pair(arrays())
    expected = list(theirs)
    assert all_same(ours, expected)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"same" if all_same(ours, expected) else b"different")
        os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"same"
    os.close(read)
    assert os.waitpid(child, 0)[1] == 0


def test_from_another_thread(dataset: Any) -> None:
    """An iterator may be made here and used up on another thread."""
    ours, theirs = pair(dataset, shuffle=True)
    batches, got = iter(ours), list[Any]()
    thread = threading.Thread(target=lambda: got.extend(batches))
    thread.start()
    thread.join(60)
    assert all_same(got, theirs)


def _resident() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


ENDS: dict[str, Callable[[Iterator[Any]], None]] = {
    "exhausted": lambda batches: [None for _ in batches].clear(),
    "break": lambda batches: [next(batches) for _ in range(3)].clear(),
    "not begun": lambda batches: None,  # noqa: ARG005 # that is the point
}


@pytest.mark.parametrize("end", sorted(ENDS))
@pytest.mark.parametrize("route", sorted(DATASETS))
def test_nothing_grows(route: str, end: str) -> None:
    """Threads, descriptors and memory after 30 more epochs are as after the first ones."""
    ours, _ = pair({"arrays": arrays, "own": Own}[route](2000), shuffle=True)

    def epochs(count: int) -> None:
        for _ in range(count):
            ENDS[end](iter(ours))

    epochs(8)
    threads, descriptors, before = threading.active_count(), _descriptors(), _resident()
    epochs(30)
    assert threading.active_count() == threads
    assert _descriptors() == descriptors
    assert _resident() - before < 5 << 20  # the batches of 30 epochs are 15 MiB


def test_loaders_leave_nothing() -> None:
    """Loaders that come and go take their memory with them."""

    def once() -> None:
        for _ in gpupipe.DataLoader(arrays(4096), batch_size=512, device="cpu"):
            pass

    for _ in range(5):
        once()
    threads, before = threading.active_count(), _resident()
    for _ in range(40):
        once()
    assert threading.active_count() == threads
    assert _resident() - before < 10 << 20  # an epoch is 1 MiB


SCRIPT = """
    import sys, time
    import numpy as np, torch
    from PIL import Image
    from torchvision import transforms as T
    import gpupipe

    class Own(torch.utils.data.Dataset):
        transform = T.Compose([T.ToTensor(), T.Normalize((0.3,), (0.2,))])
        images = np.zeros((20000, 28, 28), np.uint8)
        def __len__(self): return 20000
        def __getitem__(self, i): return self.transform(Image.fromarray(self.images[i])), i

    own = Own()
    known = gpupipe.ArrayDataset(Own.images, np.arange(20000), transform=Own.transform)
    dataset = own if sys.argv[1] == "own" else known
    loader = gpupipe.DataLoader(dataset, batch_size=16, shuffle=True, device="cpu")
"""


def _start(tmp_path: Path, route: str, body: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(body), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script), route],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("route", ["arrays", "own"])
@pytest.mark.parametrize("busy", ["pass", "time.sleep(0.01)"])
def test_interrupt(tmp_path: Path, route: str, busy: str) -> None:
    """Ctrl-C in the middle of an epoch ends the process at once, with the loop's own traceback."""
    process = _start(
        tmp_path,
        route,
        f"""
        print("begun", flush=True)
        while True:
            for images, labels in loader:
                {busy}
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode in (130, -signal.SIGINT)
    assert "Exception in thread" not in errors, errors
    assert "Exception ignored" not in errors, errors
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors


@pytest.mark.slow
@pytest.mark.parametrize("route", ["arrays", "own"])
@pytest.mark.parametrize(
    "body",
    [
        "held = iter(loader); next(held)",
        "held = iter(loader); next(held); cycle = [held]; cycle.append(cycle)",
        "import builtins; builtins.held = iter(loader); next(builtins.held); sys.exit(0)",
        "held = [iter(loader) for _ in range(20)]; [next(h) for h in held]",
    ],
    ids=["global", "cycle", "builtins", "many"],
)
def test_exit_with_a_live_iterator(tmp_path: Path, route: str, body: str) -> None:
    """The interpreter ends quietly while an iterator lives."""
    process = _start(tmp_path, route, body)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("route", ["arrays", "own"])
def test_interrupts_do_not_break_a_loader(tmp_path: Path, route: str) -> None:
    """A loader whose ``next()`` was interrupted many times still gives whole epochs."""
    process = _start(
        tmp_path,
        route,
        """
        import signal, threading
        sum(len(x) for x, _ in loader)
        interrupt = lambda: signal.raise_signal(signal.SIGINT)
        hits = 0
        for round in range(30):
            timer = threading.Timer(0.002 + 0.001 * round, interrupt)
            try:
                timer.start()
                while True:
                    for images, labels in loader:
                        pass
            except KeyboardInterrupt:
                hits += 1
            timer.join()
        assert hits == 30, hits
        seen = torch.cat([labels for _, labels in loader])
        assert torch.equal(seen.sort().values, torch.arange(20000)), seen
        print("whole", threading.active_count())
        """,
    )
    out, errors = process.communicate(timeout=120)
    assert out.startswith("whole"), errors
    assert process.returncode == 0


def test_uses_no_tensor_subclass() -> None:
    """Batches are plain tensors with storages of their own."""
    images, labels = next(iter(pair(arrays())[0]))
    assert type(images) is type(labels) is torch.Tensor
    assert images.is_contiguous()
    assert images.storage_offset() == 0


def test_tensor_dataset_without_transform() -> None:
    """A dataset without a transform gives torch's batches, with one warning."""
    dataset = TensorDataset(torch.zeros(20, 1, 3, 3, dtype=torch.uint8))
    loader = gpupipe.DataLoader(dataset, batch_size=8, device="cpu")
    with pytest.warns(gpupipe.GpupipeWarning, match="nothing was fused"):
        first = list(loader)
    assert all_same(first, TorchDataLoader(dataset, batch_size=8))
    assert all_same(loader, first)
