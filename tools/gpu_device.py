"""Where tools/gpu_check.py measures: a GPU, or a stand-in that runs the same kernels in the simulator.

Nothing here imports TVM's compiler or llmc's schedules: on the machine with the GPU kernels come built.
"""

from __future__ import annotations

import json
import statistics
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[int], Any]  # of a turn: each turn takes the next copy of what must not lie in a cache
_SPIN = 30_000  # cycles that the GPU waits per call that the host is about to launch: some 15 us
_AIM = 2e-4  # seconds that one measurement should last, so that events' steps of 0.5 us do not matter
_MOST_CALLS = 20


@dataclass(frozen=True)
class Sizes:
    """What is measured. Matmuls: name -> outputs, inputs, whether two halves are gated.

    Attributes:
        squares: n of n x n x n matmuls.
        few: rows of flat matmuls.
        prefill, decode: tokens of context of attention kernels.
        experts: number, outputs, inputs.
        model: hidden size, layers, heads, cached heads, head size, MLP size, vocabulary.
        prompt, tokens: of whole models: tokens of a prefill, and decoded ones.
    """

    squares: tuple[int, ...]
    shapes: dict[str, tuple[int, int, bool]]
    few: tuple[int, ...]
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    heads: tuple[int, int, int]
    experts: tuple[int, int, int]
    expert_rows: tuple[int, ...]
    many: int
    peak: int
    copy: int
    model: tuple[int, int, int, int, int, int, int]
    prompt: int
    tokens: int
    tiny_tokens: int


# the matmuls of an 8B Llama; its gated one has 2 x 14336 rows
FULL = Sizes(
    squares=(4096, 6144, 8192),
    shapes={
        "qkv": (6144, 4096, False),
        "o": (4096, 4096, False),
        "gate_up": (14336, 4096, True),
        "down": (4096, 14336, False),
    },
    few=(2, 4, 8, 16),
    prefill=(4096, 8192, 16384),
    decode=(4096, 32768),
    heads=(32, 8, 128),
    experts=(8, 14336, 4096),
    expert_rows=(2, 32, 1024, 32768),
    many=4096,
    peak=8192,
    copy=4 << 30,
    model=(4096, 32, 32, 8, 128, 14336, 128256),
    prompt=4096,
    tokens=128,
    tiny_tokens=128,
)
# for the stand-in: every line of code, in seconds
TINY = Sizes(
    squares=(64,),
    shapes={"o": (64, 64, False), "gate_up": (64, 64, True)},
    few=(2, 16),
    prefill=(48,),
    decode=(160,),
    heads=(4, 2, 32),
    experts=(2, 64, 64),
    expert_rows=(3,),
    many=20,
    peak=64,
    copy=1 << 16,
    model=(64, 2, 4, 2, 16, 128, 256),
    prompt=24,
    tokens=6,
    tiny_tokens=8,
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section, what: e.g. ``gemm``, ``8192^3``.
        value: what was reached, in `unit`.
        target: the least `value` that is enough; None = for information.
        at_most: the target is a bound from above.
        note: further figures.
        facts: the raw numbers (microseconds, errors ...).
    """

    section: str
    what: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False
    note: str = ""
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the target is; None = there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Row:
        return Row(**json.loads(text))


class Device(ABC):
    """Tensors, kernels and times.

    Attributes:
        where: torch's name of the device.
        sizes: of what is measured on it.
        cache: bytes that measurements must be larger than.
    """

    where: str
    sizes: Sizes
    cache: int

    @abstractmethod
    def kernels(self, path: Path) -> Callable[..., Callable[[], None]]:
        """(name, arguments) -> call of a kernel of a file that tools/gpu_prepare.py wrote, on torch tensors and ints."""

    @abstractmethod
    def times(self, *calls: Call, turns: int = 15) -> list[float]:
        """Median seconds of each, measured in turns."""

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers in bfloat16."""
        return (torch.randn(*shape, device=self.where) * scale).to(torch.bfloat16)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A result full of NaN (0 for integers), so that what a kernel does not write shows."""
        filled = torch.empty(*shape, device=self.where, dtype=dtype)
        return filled.fill_(float("nan") if dtype.is_floating_point else 0)

    def integers(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self.where, dtype=torch.int32)

    def copies(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor and copies of it, so many that going round finds none in the cache."""
        count = 1 + min(32, 3 * self.cache // max(1, tensor.nbytes))
        return [tensor, *(tensor.clone() for _ in range(count - 1))]


class Gpu(Device):
    """The first GPU, through torch and TVM's CUDA runtime."""

    def __init__(self) -> None:
        from llmc.runtime import cuda
        from llmc.runtime.library import ffi

        cuda.load_runtime()
        self._ffi = ffi()
        self.where, self.sizes = "cuda", FULL
        self.cache = int(torch.cuda.get_device_properties(0).L2_cache_size)

    def kernels(self, path: Path) -> Callable[..., Callable[[], None]]:
        from llmc import cuda_driver
        from llmc.targets.cuda.library import load_library

        module = load_library(path, cuda_driver.query().devices[0])

        def call(name: str, *arguments: Any) -> Callable[[], None]:
            function = module[name]
            held = [a if isinstance(a, int) else self._ffi.from_dlpack(a) for a in arguments]
            return lambda: function(*held)

        return call

    def times(self, *calls: Call, turns: int = 15) -> list[float]:
        counts = []
        for call in calls:
            call(0)
            torch.cuda.synchronize()
            counts.append(max(1, min(_MOST_CALLS, int(_AIM / max(self._time(call, 0, 1), 1e-6)))))
        found: list[list[float]] = [[] for _ in calls]
        at = 0
        for turn in range(turns + 2):
            for kept, call, count in zip(found, calls, counts, strict=True):
                took = self._time(call, at, count)
                at += count
                if turn >= 2:
                    kept.append(took)
        return [statistics.median(kept) for kept in found]

    def _time(self, call: Call, first: int, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the host launches everything while the GPU waits, so that no launch is timed
        torch.cuda._sleep(_SPIN * (count + 2))
        begin.record()
        for i in range(count):
            call(first + i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / count


class Simulated(Device):
    """The processor, with kernels in the simulator: right numbers, and times that mean nothing."""

    def __init__(self) -> None:
        self.where, self.sizes, self.cache = "cpu", TINY, 0

    def kernels(self, path: Path) -> Callable[..., Callable[[], None]]:
        import tvm

        from llmc.simulate import Kernel

        with zipfile.ZipFile(path) as held:
            module = tvm.ir.load_json(held.read("tir.json").decode())

        def call(name: str, *arguments: Any) -> Callable[[], None]:
            kernel = Kernel(module[name])
            held = [a if isinstance(a, int) else _array(a) for a in arguments]
            return lambda: kernel.run(held) and None

        return call

    def times(self, *calls: Call, turns: int = 15) -> list[float]:
        found = []
        for call in calls:
            begin = time.perf_counter()
            call(0)
            found.append(time.perf_counter() - begin)
        return found


def _array(tensor: torch.Tensor) -> Any:
    """A numpy view of a tensor on the processor."""
    import ml_dtypes

    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def about(path: Path) -> Any:
    """What the writer of a file of kernels said of them."""
    with zipfile.ZipFile(path) as held:
        return json.loads(held.read("about.json"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected values; infinite if anything is not finite."""
    difference = (found.float() - expected.float()).pow(2).mean().sqrt()
    value = float(difference / expected.float().pow(2).mean().sqrt())
    return value if value == value else float("inf")


def mean_ratio(values: Sequence[float]) -> float:
    """Geometric mean."""
    return statistics.geometric_mean(values)
