"""Benchmarks of packed layers on this machine: seconds for each scheme, shape and batch, relative to its bandwidth."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from mpq.core.assignment import random_assignment
from mpq.core.errors import MpqError
from mpq.core.latency import Latency, LatencyTable
from mpq.core.scheme import Scheme, parse_scheme
from mpq.kernels.clock import Contestant, copies, interleaved
from mpq.kernels.cpu import native as cpu
from mpq.kernels.cpu.pages import on_large_pages
from mpq.kernels.layout import Packed, best_layout, pack, to_layout
from mpq.kernels.mixed import packed_weight
from mpq.kernels.weight import PackedWeight
from mpq.network.calibration import seeded
from mpq.rounding.mixed import mixed
from mpq.rounding.reference import quantize

BEYOND = 256 * 2**20  # bytes of weights to cycle through: more than a core's share of the cache, or a GPU's L2
PAGE = {"cpu": 2**23, "cuda": 2**27}  # bytes that one call reads or copies when bandwidth is measured
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Medians of one interleaved run, in seconds."""

    scheme: str
    rows: int
    cols: int
    batch: int
    seconds: float
    fastest: float
    nbytes: int  # stored bytes of the weight
    bandwidth: float  # bytes per second that reading alone (copying, on a GPU) reached in the same run
    float32: float
    bfloat16: float

    @property
    def roof(self) -> float:
        """Stored bytes per second, as a fraction of the bandwidth."""
        return self.nbytes / self.seconds / self.bandwidth

    @property
    def latency(self) -> Latency:
        """The entry of the latency table."""
        return Latency(self.scheme, self.rows, self.cols, self.batch, self.seconds)


def device_of(name: str) -> torch.device:
    """The device called `name`: "cpu", "cuda" or "cuda:1".

    Raises:
        MpqError: the device is not present, or kernels are not timed on it.
    """
    kind, _, index = name.partition(":")
    if kind not in PAGE or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise MpqError(f"{name!r} is not a device that kernels are timed on: expected cpu, cuda or cuda:N")
    if kind == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise MpqError(
            "--device cuda needs an NVIDIA GPU and a PyTorch built for it, and PyTorch finds none here: "
            "run this on a machine with one, or with --device cpu"
        )
    number = int(index) if index else torch.cuda.current_device()
    if number >= torch.cuda.device_count():
        raise MpqError(f"no device {name}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device("cuda", number)


def describe(device: torch.device) -> str:
    """Which kernels a device runs, in one line."""
    if device.type == "cpu":
        return f"CPU kernels: {cpu.level_name() if cpu.native() else 'none compiled, the plain PyTorch reference runs'}"
    name = torch.cuda.get_device_name(device)
    if find_spec("triton") is None:
        return f"GPU kernels on {name}: none, the plain PyTorch reference runs; pip install triton"
    from mpq.kernels.gpu.triton.tables import provenance_of

    return f"GPU kernels on {name}: Triton, block choices {provenance_of(name)}"


def measure(
    schemes: Sequence[str],
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 30,
    beyond: int = BEYOND,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
) -> Iterator[Timing]:
    """Time each scheme against the device's bandwidth and PyTorch's float32 and bfloat16, interleaved in one run.

    Calls cycle through copies of the weights that fill `beyond` bytes, to defeat the cache. `dtype` is the inputs',
    by default float32 on a CPU and bfloat16 on a GPU.

    Raises:
        MpqError: an unknown scheme.
    """
    parsed = [parse_scheme(name) for name in schemes]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    bandwidth = streaming(device, beyond)
    for rows, cols in shapes:
        dense = torch.randn((rows, cols), generator=seeded(0, "bench", rows, cols)).to(device)
        floats = {kind: copies([dense.to(kind)], beyond) for kind in (torch.float32, torch.bfloat16)}
        for scheme in parsed:
            nbytes, product = _packed(dense, scheme, beyond)
            for batch in batches:
                x = torch.randn((batch, cols), generator=seeded(1, batch)).to(device, dtype)
                contestants = [
                    product(x),
                    *(_dense(x.to(kind), weights) for kind, weights in floats.items()),
                    bandwidth,
                ]
                ours, single, half, read = interleaved(contestants, repeats, device)
                yield Timing(
                    scheme.name, rows, cols, batch, statistics.median(ours), min(ours), nbytes,
                    _moved(device) / statistics.median(read), statistics.median(single), statistics.median(half),
                )  # fmt: skip


def _moved(device: torch.device) -> int:
    """Bytes that a call of `streaming` moves: a copy reads and writes."""
    return PAGE[device.type] * (2 if device.type == "cuda" else 1)


def streaming(device: torch.device, beyond: int) -> Contestant:
    """Reading `PAGE` bytes of memory, or copying them on a GPU: the bound of every kernel."""
    # Read in pieces as short as a layer: a longer read is more likely to be preempted.
    page = torch.ones(PAGE[device.type] // 4, device=device)
    if device.type == "cuda":
        target = torch.empty_like(page)
        return Contestant([partial(target.copy_, page)])
    return Contestant(
        [partial(cpu.read, one) for (one,) in copies([page], beyond, on_large_pages)]
    )  # the fastest memory to read


def _dense(x: Tensor, weights: Sequence[Sequence[Tensor]]) -> Contestant:
    return Contestant([partial(torch.nn.functional.linear, x, weight) for (weight,) in weights])


def _packed(dense: Tensor, scheme: Scheme, beyond: int) -> tuple[int, Callable[[Tensor], Contestant]]:
    """The weight's stored bytes, and a function from inputs to the contestant of the product."""
    activation = "" if scheme.activation is None else scheme.activation.name
    if scheme.mix is not None:
        mix = random_assignment(scheme.mix, *dense.shape)
        packed = pack(mixed(mix, [quantize(dense, format) for format in mix.formats]))
        many = [placed(packed) for _ in range(max(2, beyond // packed.nbytes))]
        return packed.nbytes, lambda x: Contestant([partial(one.linear, x, None, activation) for one in many])
    packed = pack(quantize(dense, scheme.weight))
    arranged = to_layout(packed, best_layout(packed, dense.device))
    arguments = (scheme.weight.name, *packed.shape, arranged.layout, activation)
    weights = copies(list(arranged.tensors.values()), beyond, on_large_pages)  # as `panels.arrange` allocates them
    linear = torch.ops.mpq.linear.default
    return packed.nbytes, lambda x: Contestant([partial(linear, x, weight, None, *arguments) for weight in weights])


def placed(packed: Packed) -> PackedWeight:
    """A weight arranged for its device, its tensors on large pages."""
    weight = packed_weight(packed)
    weight.arrange()
    for module in weight.modules():
        module._buffers.update({name: on_large_pages(one) for name, one in module._buffers.items() if one is not None})
    return weight


def latency_table(
    timings: Sequence[Timing], device: torch.device = CPU, attention: Sequence[Latency] = ()
) -> LatencyTable:
    """The latency table of timings of layers and of attention, for searches."""
    if device.type == "cuda":
        provenance: dict[str, object] = {
            "device": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "clock": "graph replay between device events",
        }
    else:
        provenance = {"threads": torch.get_num_threads(), "instructions": cpu.level_name()}
    if timings:
        provenance["bandwidth"] = statistics.median(timing.bandwidth for timing in timings)
    return LatencyTable((*(timing.latency for timing in timings), *attention), provenance)
