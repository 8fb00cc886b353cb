"""How close is the kernel ``normalize`` to the memory's limit, and to its peers?

The limit is a device kernel that reads and writes the same bytes per element and does nothing
else. Every contender's bits or values are checked first. Inputs and outputs rotate through more
memory than the L2 cache holds, contenders take turns, and each figure is the median of rounds with
the spread between its quartiles.

    python -m benchmarks.bench_normalize_cuda --json benchmarks/results/normalize_cuda.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms import v2

from gpupipe import cuda_ops, kernel_source
from gpupipe.tables import Layout, Lookup

if TYPE_CHECKING:
    from collections.abc import Callable

SETS = 3  # of input and output, in rotation
CALLS = 6  # per timing
SLEEP_CYCLES = 2_000_000  # hides the host's launches from the events
MEAN = (0.485, 0.456, 0.406, 0.5)
STD = (0.229, 0.224, 0.225, 0.25)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LIMIT = r"""
template <int BYTES> struct Word;
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
__device__ unsigned int fold(unsigned int w) { return w; }
__device__ unsigned int fold(uint2 w) { return w.x ^ w.y; }
// Reads BYTES and writes 16 for each thread, neighbours side by side, four loads in flight.
template <int BYTES>
__global__ void limit(const typename Word<BYTES>::type* source, uint4* output, long long vectors) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long start = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = start; i < vectors; i += 4 * stride) {
        unsigned int got[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            got[u] = i + u * stride < vectors ? fold(source[i + u * stride]) : 0u;
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            if (i + u * stride < vectors) {
                output[i + u * stride] = make_uint4(got[u], got[u] + 1, got[u] + 2, got[u] + 3);
            }
        }
    }
}
"""

ELEMENTWISE = """
const int c = i / pixels % channels;
const ptrdiff_t p = i / (pixels * channels) * pixels + i % pixels;
y = ((float)x[p * channels + c] / 255.0f - mean[c]) / std[c];
"""


@dataclass(frozen=True)
class Setting:
    """What is measured: C, the dtype, the layouts and what the images show."""

    channels: int
    dtype: str
    planar_in: bool
    planar_out: bool
    content: str

    def __str__(self) -> str:
        """Name it as the table does."""
        source = "NCHW" if self.planar_in else "NHWC"
        output = "NCHW" if self.planar_out else "channels_last"
        return f"C={self.channels} {source} to {self.dtype} {output}, {self.content}"


def make_images(setting: Setting, n: int, h: int, w: int) -> torch.Tensor:
    """Return uint8 images in the setting's layout, of noise or of slow gradients."""
    shape = (n, setting.channels, h, w) if setting.planar_in else (n, h, w, setting.channels)
    if setting.content == "noise":
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    ramp = torch.arange(h, device="cuda")[:, None] // 3 + torch.arange(w, device="cuda") // 5
    ramp = ramp + 7 * torch.arange(n, device="cuda")[:, None, None]
    plane = (ramp % 256).to(torch.uint8)
    stacked = torch.stack([plane + 20 * c for c in range(setting.channels)], 1)
    return (stacked if setting.planar_in else stacked.permute(0, 2, 3, 1)).contiguous()


def make_lookup(setting: Setting) -> Lookup:
    """Return the table of ToDtype and Normalize."""
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(setting.channels, 1, 256)
    values = v2.functional.to_dtype(ramp, torch.float32, scale=True)
    mean, std = list(MEAN[: setting.channels]), list(STD[: setting.channels])
    values = v2.functional.normalize(values, mean, std).squeeze(1)
    return Lookup(values.to(DTYPES[setting.dtype]))


def plain(
    planes: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    order: torch.memory_format,
) -> torch.Tensor:
    """Return what a training script writes for raw images seen as NCHW."""
    x = (planes.to(torch.float32) / 255 - mean) / std
    return x.to(dtype).contiguous(memory_format=order)


class Contest:
    """All contenders of one setting, over the same rotating inputs."""

    def __init__(self, setting: Setting, megabytes: int, h: int, w: int, *, peers: bool) -> None:
        """Allocate the inputs and outputs and check every contender once."""
        self.setting, c = setting, setting.channels
        self.n = -(-megabytes * (1 << 20) // (c * h * w))
        self.h, self.w = h, w
        self.dtype = DTYPES[setting.dtype]
        self.sources = [make_images(setting, self.n, h, w) for _ in range(SETS)]
        order = torch.contiguous_format if setting.planar_out else torch.channels_last
        shape = (self.n, c, h, w)
        self.outputs = [
            torch.empty(shape, dtype=self.dtype, device="cuda", memory_format=order)
            for _ in range(SETS)
        ]
        self.order, self.lookup = order, make_lookup(setting)
        self.mean = torch.tensor(MEAN[:c], device="cuda").view(c, 1, 1)
        self.std = torch.tensor(STD[:c], device="cuda").view(c, 1, 1)
        self.contenders: dict[str, Callable[[int], Any]] = {
            "gpupipe": self.ours,
            "limit": self.limit(),
        }
        if peers:
            self.contenders |= {
                "torch ops": self.with_torch(plain),
                "torch.compile": self.with_torch(torch.compile(plain, dynamic=False)),
                "torchvision v2": self.torchvision(),
            }
            if self.dtype != torch.bfloat16 and setting.planar_out and not setting.planar_in:
                self.contenders["CuPy elementwise"] = self.elementwise()
        self.check()

    @property
    def bytes_moved(self) -> int:
        """Bytes that one call must read and write."""
        return self.outputs[0].numel() * (1 + self.dtype.itemsize)

    def ours(self, k: int) -> torch.Tensor:
        """Launch our kernel on set ``k``."""
        layout: Layout = "NCHW" if self.setting.planar_in else "NHWC"
        cuda_ops.normalize(self.sources[k], None, [self.outputs[k]], self.lookup, layout=layout)
        return self.outputs[k]

    def planes(self, source: torch.Tensor) -> torch.Tensor:
        """View a source as NCHW."""
        return source if self.setting.planar_in else source.permute(0, 3, 1, 2)

    def with_torch(self, function: Callable[..., torch.Tensor]) -> Callable[[int], torch.Tensor]:
        """Return ``plain``, or the same compiled, on set ``k``."""
        rest = (self.mean, self.std, self.dtype, self.order)
        return lambda k: function(self.planes(self.sources[k]), *rest)

    def torchvision(self) -> Callable[[int], torch.Tensor]:
        """Return torchvision's transforms on the device tensor."""
        c = self.setting.channels
        pipeline = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN[:c]), list(STD[:c]))]
        )

        def run(k: int) -> torch.Tensor:
            result: torch.Tensor = pipeline(self.planes(self.sources[k]))
            return result.to(self.dtype).contiguous(memory_format=self.order)

        return run

    def limit(self) -> Callable[[int], None]:
        """Return the kernel that only moves the bytes."""
        cupy = kernel_source.require_cupy()
        width = 16 // self.dtype.itemsize
        name = f"limit<{width}>"
        module = cupy.RawModule(code=LIMIT, options=("-std=c++17",), name_expressions=(name,))
        kernel = module.get_function(name)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        vectors = self.outputs[0].numel() // width
        stream = torch.cuda.current_stream()

        def run(k: int) -> None:
            arguments = (self.sources[k].data_ptr(), self.outputs[k].data_ptr(), vectors)
            with cupy.cuda.Stream.from_external(stream):
                kernel((multiprocessors * 8,), (256,), arguments)

        return run

    def elementwise(self) -> Callable[[int], torch.Tensor]:
        """Return the CuPy kernel that one would write first."""
        cupy = kernel_source.require_cupy()
        kind = self.setting.dtype
        kernel = cupy.ElementwiseKernel(
            "raw uint8 x, raw float32 mean, raw float32 std, int64 pixels, int64 channels",
            f"{kind} y", ELEMENTWISE, f"plain_normalize_{kind}",
        )  # fmt: skip
        mean, std = cupy.asarray(self.mean.view(-1)), cupy.asarray(self.std.view(-1))
        sources = [cupy.asarray(s) for s in self.sources]
        outputs = [cupy.asarray(o) for o in self.outputs]
        stream = torch.cuda.current_stream()

        def run(k: int) -> torch.Tensor:
            with cupy.cuda.Stream.from_external(stream):
                kernel(sources[k], mean, std, self.h * self.w, self.setting.channels, outputs[k])
            return self.outputs[k]

        return run

    def check(self) -> None:
        """Compare ours bit by bit with the table, the others within their rounding."""
        raw = self.planes(self.sources[0][:4]).cpu()
        values = self.lookup.values
        wanted = torch.stack([values[c][raw[:, c].long()] for c in range(raw.shape[1])], 1)
        self.outputs[0].fill_(float("nan"))
        got = self.ours(0)[:4].cpu()
        if not torch.equal(
            got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
        ):
            raise SystemExit(f"{self.setting}: gpupipe's bits differ")
        for name, call in self.contenders.items():
            if name in {"gpupipe", "limit"}:
                continue
            near = call(0)[:4].cpu().float()
            # A few units in the last place of values below 4, which is what the forms differ by.
            tolerance = 16 * torch.finfo(self.dtype).eps
            if not torch.allclose(near, wanted.float(), rtol=0, atol=tolerance):
                raise SystemExit(f"{self.setting}: {name} gives other values")

    def measure(self, rounds: int) -> dict[str, dict[str, float]]:
        """Return median milliseconds, quartiles, GB/s and share of the limit per contender."""
        times: dict[str, list[float]] = {name: [] for name in self.contenders}
        rng = random.Random(0)  # noqa: S311 # an order of turns
        for turn in range(rounds + 2):
            names = list(self.contenders)
            rng.shuffle(names)
            for name in names:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001 # as torch's own benchmarks
                start.record()
                for call in range(CALLS):
                    self.contenders[name](call % SETS)
                end.record()
                end.synchronize()
                if turn >= 2:  # noqa: PLR2004 # two rounds to warm up
                    times[name].append(start.elapsed_time(end) / CALLS)
        best = statistics.median(times["limit"])
        table = {}
        for name, each in times.items():
            low, median, high = statistics.quantiles(each, n=4)
            table[name] = {
                "ms": median, "ms_low": low, "ms_high": high,
                "gb_per_s": self.bytes_moved / median / 1e6, "share_of_limit": best / median,
            }  # fmt: skip
        return table


def settings(*, quick: bool) -> list[Setting]:
    """Every C, dtype, layout pair and content; a few of them for a quick look."""
    every = [
        Setting(c, dtype, planar_in, planar_out, content)
        for c, dtype, planar_in, planar_out, content in itertools.product(
            (1, 3, 4), DTYPES, (False, True), (True, False), ("noise", "smooth")
        )
        if c != 1 or (planar_in and planar_out)
    ]
    if quick:
        every = [s for s in every if s.channels == 3 and s.content == "noise"]  # noqa: PLR2004
    return every


def main() -> None:
    """Run the contests, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="JSON file to write")
    parser.add_argument("--megabytes", type=int, default=64, help="raw bytes of a batch, MiB")
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="C of 3 and noise only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    about = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cupy": kernel_source.require_cupy().__version__,
        "python": platform.python_version(),
        "megabytes": arguments.megabytes,
        "size": [arguments.height, arguments.width],
        "rounds": arguments.rounds,
    }
    print(about)
    print("| setting | contender | ms (quartiles) | GB/s | of limit |\n|---|---|---|---|---|")
    results = []
    for setting in settings(quick=arguments.quick):
        # RGB as it is decoded; what the peers do does not depend on the content.
        peers = setting.channels == 3 and not setting.planar_in and setting.content == "noise"  # noqa: PLR2004
        size = (arguments.megabytes, arguments.height, arguments.width)
        table = Contest(setting, *size, peers=peers).measure(arguments.rounds)
        results.append({**asdict(setting), "contenders": table})
        for name, row in table.items():
            spread = f"{row['ms']:.4f} ({row['ms_low']:.4f}-{row['ms_high']:.4f})"
            share = f"{row['gb_per_s']:.0f} | {row['share_of_limit']:.1%}"
            print(f"| {setting} | {name} | {spread} | {share} |", flush=True)
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
