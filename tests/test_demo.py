"""``gpupipe demo``, its data and its picture."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional
from torchvision import datasets
from torchvision import transforms as T  # noqa: N812 # as everyone writes it

import gpupipe
from gpupipe import contact_sheet, demo, demo_data, demo_race
from gpupipe.demo_race import Contender


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand where there is no data, no cache and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPUPIPE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    return tmp_path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Give a folder of whole MNIST-layout files."""
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    demo_data.write(folder, 300, 100)
    return folder


def say_nothing(_: str) -> None:
    """Take what the demo would say."""


def run(**arguments: Any) -> str:
    """Run a quick demo on the CPU; return what it printed, on one line."""
    out = StringIO()
    demo.run(Console(file=out, width=120), device="cpu", quick=True, **arguments)
    return " ".join(out.getvalue().split())


def test_offline(elsewhere: Path) -> None:
    """Without data and network it says so, and all of it runs on the drawn set, so labelled."""
    text = run()
    assert "The download failed: " in text
    assert "DRAWN" in text
    assert "drawn garments (not Fashion-MNIST), batch 256" in text
    assert "published 0.2860" not in text
    assert text.count("same") >= 4
    assert "DIFFERENT" not in text
    assert "every bit the same" in text
    accuracy = re.search(r"test accuracy ([\d.]+)% on 500 held-out images", text)
    assert accuracy is not None
    assert float(accuracy[1]) > 40  # a tenth would be chance, after 30 steps
    assert text.endswith("+ import gpupipe + loader = gpupipe.lift(loader)")
    with Image.open(elsewhere / "gpupipe-demo.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > sheet.height > 400


def test_with_data(raw: Path, tmp_path: Path) -> None:
    """With data it uses that, and names the published statistics beside its own."""
    data = raw.parents[1]
    text = run(data=data, out=tmp_path / "sheet.png")
    stats = gpupipe.channel_stats(datasets.FashionMNIST(str(data)))
    assert "Fashion-MNIST, 300 + 100 images" in text
    assert f"{stats.mean[0]:.4f} / {stats.std[0]:.4f} (published 0.2860 / 0.3530)" in text
    assert "DRAWN" not in text
    assert (tmp_path / "sheet.png").exists()


def test_data_by_environment(raw: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$GPUPIPE_DATA is used where --data is not given, and passed over where it has none."""
    monkeypatch.setenv("GPUPIPE_DATA", str(raw.parents[1]))
    assert demo_data.find(None, say_nothing) == raw.parents[1]
    monkeypatch.setenv("GPUPIPE_DATA", str(elsewhere))
    said: list[str] = []
    assert demo_data.find(None, said.append) is None
    assert "looking elsewhere" in said[0]


def test_data_in_the_cache(raw: Path, elsewhere: Path) -> None:
    """What was downloaded once is used again, without the network."""
    cache = elsewhere / "cache" / "gpupipe" / "data"
    cache.parent.mkdir(parents=True)
    raw.parents[1].rename(cache)
    assert demo_data.find(None, say_nothing) == cache


IMAGES = 16 + 300 * 28 * 28


@pytest.mark.parametrize(
    ("name", "keep", "expected"),
    [
        ("train-images-idx3-ubyte", 5_000, f"found 5,000 bytes, its header promises {IMAGES:,}"),
        ("train-images-idx3-ubyte", IMAGES - 1, f"found {IMAGES - 1:,} bytes"),
        ("train-images-idx3-ubyte", 16, "found 16 bytes"),
        ("train-images-idx3-ubyte", 10, "an IDX header has 16 bytes, found 10"),
        ("t10k-labels-idx1-ubyte", 3, "found 3"),
        ("t10k-labels-idx1-ubyte", 0, "found 0"),
        ("train-labels-idx1-ubyte", 100, "found 100 bytes, its header promises 308"),
    ],
)  # fmt: skip
def test_truncated(raw: Path, name: str, keep: int, expected: str) -> None:
    """A truncated file is told with its name, its bytes, those it promises, and what to do."""
    path = raw / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(gpupipe.SourceError) as error:
        demo_data.find(raw.parents[1], say_nothing)
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert "download it again" in str(error.value)


def test_other_damage(raw: Path) -> None:
    """A file too long, of another kind, or of another number of labels is told."""
    images, labels = raw / demo_data.IMAGES["train"], raw / demo_data.LABELS["train"]
    whole = images.read_bytes()
    images.write_bytes(whole + b"x")
    with pytest.raises(gpupipe.SourceError, match=rf"too long: found {IMAGES + 1:,} bytes"):
        demo_data.find(raw.parents[1], say_nothing)
    images.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(gpupipe.SourceError, match=r"begins with b'<htm'"):
        demo_data.find(raw.parents[1], say_nothing)
    images.write_bytes(whole)
    demo_data.write(raw.parent / "other", 200, 1)
    (raw.parent / "other" / labels.name).replace(labels)
    with pytest.raises(gpupipe.SourceError, match="200 labels for 300 images"):
        demo_data.find(raw.parents[1], say_nothing)


def test_drawn_is_reproducible_and_parted() -> None:
    """The same seed draws the same, another seed other images, and every class occurs."""
    images, labels = demo_data.draw(200, 0)
    again, others = demo_data.draw(200, 0)[0], demo_data.draw(200, 1)[0]
    assert images.dtype == np.uint8
    assert images.shape == (200, 28, 28)
    assert np.array_equal(images, again)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in others}
    assert set(labels.tolist()) == set(range(10))


def test_drawn_is_learnable() -> None:
    """A linear model tells the drawn classes apart, but not all of them."""
    torch.manual_seed(0)
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(i).flatten(1) / 255, torch.from_numpy(k).long())
        for i, k in (demo_data.draw(1500, 0), demo_data.draw(500, 1))
    )
    model = torch.nn.Linear(784, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    assert 0.6 < accuracy < 0.995


def test_check_sees_other_batches() -> None:
    """A contender with one wrong bit, or another order, is not called the same."""
    x, y = torch.rand(4, 1, 5, 5), torch.arange(4)
    off = x.clone()
    off[3, 0, 4, 4] += 1e-6

    def contender(images: torch.Tensor, labels: torch.Tensor) -> Contender:
        return Contender("", lambda _: iter([(images, labels), (images, labels)]))

    racers = [contender(x, y), contender(x, y), contender(off, y), contender(x, y.flip(0))]
    demo_race.check(racers)
    assert [racer.same for racer in racers] == [True, True, False, False]


def test_demo_stops_where_bits_differ(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No table is shown for batches that differ from torchvision's."""

    def differ(racers: list[Contender]) -> None:
        racers[-1].same = False

    monkeypatch.setattr(demo_race, "check", differ)
    with pytest.raises(gpupipe.VerificationError, match="differ"):
        run(data=raw.parents[1], out=tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("count", [1, 256, 257, 1300])
def test_turns_end(count: int) -> None:
    """A dataset of any size is timed, by every contender, and the rate is a number."""
    images, labels = demo_data.draw(count, 0)
    dataset = datasets.FashionMNIST.__new__(datasets.FashionMNIST)
    dataset.data, dataset.targets = torch.from_numpy(images), torch.from_numpy(labels).long()
    dataset.transform = T.Compose([T.ToTensor(), T.Normalize((0.3,), (0.2,))])
    dataset.target_transform = None
    cpu = torch.device("cpu")
    racers = demo_race.contenders(dataset, cpu, quick=True)
    demo_race.check(racers)
    for racer in racers:
        assert racer.same
        demo_race.turn(racer, 0, cpu)
        assert racer.rate > 0


def test_torch_threads_are_put_back() -> None:
    """The race leaves torch's number of threads as it was, also after an exception."""
    before = torch.get_num_threads()

    def fail() -> None:
        with demo_race.torch_threads(1):
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


def test_false_colour() -> None:
    """Zero is white, the ends are blue and red, and halves lie between."""
    ramp = np.array([[-2.0, -1.0, 0.0, 2.0]], np.float32)
    assert contact_sheet.false_colour(ramp, 2.0).tolist() == [
        [[33, 102, 172], [144, 178, 214], [255, 255, 255], [178, 24, 43]]
    ]


def test_sheet_of_zeros(tmp_path: Path) -> None:
    """A batch without any contrast is drawn too."""
    path = tmp_path / "sheet.png"
    zeros = np.zeros((3, 9, 7))
    contact_sheet.save(path, zeros.astype(np.uint8), zeros.astype(np.float32), "abc", "title")
    with Image.open(path) as sheet:
        sheet.verify()
