"""Speed of the linear kernels on quantized weights against the bf16 kernel and the machine's limits, in one process.

    python tools/bench_quant_kernels.py bf16 q4g32 w4a8 nf4 --rows 1 8 512 --shapes 8192x2048
    python tools/bench_quant_kernels.py w4a8 w8a8 --threads 2 --rows 1 --shapes 3072x2048 2048x2048 16384x2048 2048x8192

Up to --cold rows every call reads another copy of the weight (--cycle MiB of them, in huge pages), so that it comes from
memory; with more rows the copy stays. All kernels take turns, round by round, and up to --cold rows a loop that reads 256
MiB takes turns with them. With one thread the figure is the best processor time of the calling thread, which other programs
disturb least; with more it is the median wall time, for a machine that does nothing else. Activations are bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ml_dtypes
import numpy as np

from llmc.caps import Capabilities
from llmc.host import require_permission
from llmc.limits import MachineLimits, measure
from llmc.quant.schemes import Code, by_name
from llmc.runtime.library import tensor_view
from llmc.runtime.memory import huge_zeros
from llmc.schedules.limits import read_kernel
from llmc.schedules.linear import LinearConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tile_linear import linear_by_rows
from llmc.schedules.tune_qlinear import quant_linear_by_rows
from llmc.targets.codegen import tir_pipeline
from llmc.targets.cpu.backend import BACKEND

_BF16 = "bfloat16"
_READ = "read"
_READ_BYTES = 256 << 20

Shape = tuple[int, int]
Kernel = tuple[str, Shape]  # scheme, (outputs, inputs)


class Bench:
    """The kernels of some schemes and shapes, compiled for this machine.

    Args:
        prefetch: bytes that the weight stream is asked for ahead of its use; None = as `llmc compile` has it.
    """

    def __init__(
        self, schemes: list[str], shapes: list[Shape], caps: Capabilities, prefetch: int | None
    ) -> None:
        import tvm

        self.caps = caps
        self.stored: dict[Kernel, tuple[tuple[int, ...], str]] = {}
        functions = {_READ: read_kernel(caps)}
        for kernel in ((scheme, shape) for shape in shapes for scheme in schemes):
            functions[_symbol(kernel)], *stored = self._kernel(kernel, prefetch)
            self.stored[kernel] = (stored[0], stored[1])
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
        target = BACKEND.tvm_target(caps)
        self._library = tvm.compile(module, target=target, tir_pipeline=tir_pipeline())

    def _kernel(self, kernel: Kernel, prefetch: int | None) -> tuple[Any, tuple[int, ...], str]:
        """TIR, and shape and dtype of the packed weight."""
        scheme, (outputs, inputs) = kernel
        if scheme == "bf16":
            plain = LinearConfig(outputs, inputs, _BF16, _BF16, _BF16)
            return linear_by_rows(plain, self.caps), plain.packed_shape(self.caps), _BF16
        layout = quant_layout(by_name(scheme), outputs, inputs, self.caps)
        if prefetch is None:  # as LowerLinear
            prefetch = 0 if layout.quads else QuantLinearConfig.prefetch
        config = QuantLinearConfig(outputs, layout, _BF16, _BF16, prefetch=prefetch)
        return quant_linear_by_rows(config, self.caps), layout.packed_shape, "uint8"

    def nbytes(self, kernel: Kernel) -> int:
        """Of the packed weight."""
        shape, dtype = self.stored[kernel]
        return int(np.prod(shape)) * (2 if dtype == _BF16 else 1)

    def times(self, shape: Shape, rows: int, cycle: int, seconds: float) -> dict[str, list[float]]:
        """Seconds of each call by scheme, and of reading _READ_BYTES under `read`.

        Args:
            cycle: bytes of copies of each weight that take turns; 0 = one copy.
            seconds: to spend on each kernel, at least two calls.
        """
        kernels = [kernel for kernel in self.stored if kernel[1] == shape]
        calls = {kernel[0]: self._calls(kernel, rows, cycle) for kernel in kernels}
        if cycle:
            calls[_READ] = [self._read()]
        clock = time.thread_time if self.caps.threads == 1 else time.perf_counter
        out: dict[str, list[float]] = {name: [] for name in calls}
        turn = 0
        while any(sum(out[name]) < seconds or len(out[name]) < 2 for name in calls):
            for name, copies in calls.items():
                # a few calls in a row: the first reads what the other kernels have pushed out of the caches
                for i in range(1 if name == _READ else 4):
                    call = copies[(4 * turn + i) % len(copies)]
                    start = clock()
                    call()
                    if i or name == _READ:
                        out[name].append(clock() - start)
            turn += 1
        return out

    def _calls(self, kernel: Kernel, rows: int, cycle: int) -> list[Callable[[], Any]]:
        """One call for each copy of a weight of random bytes (the values do not change the time)."""
        shape, dtype = self.stored[kernel]
        outputs, inputs = kernel[1]
        size, random = self.nbytes(kernel), np.random.default_rng(0)
        # bytes below 64 are finite numbers also where they are scales, and in bf16
        weight = np.resize(random.integers(0, 64, 1_000_003, np.uint8), size)
        copies = max(1, cycle // size)
        held = huge_zeros(copies * size).reshape(copies, size)
        held[:] = weight
        x = random.standard_normal((rows, inputs), np.float32).astype(ml_dtypes.bfloat16).view(np.uint8)
        aligned = huge_zeros(x.size)
        aligned[:] = x.reshape(-1)
        args = tensor_view(aligned, (rows, inputs), _BF16)
        y = tensor_view(huge_zeros(2 * rows * outputs), (rows, outputs), _BF16)
        function = self._library[_symbol(kernel)]
        tensors = [tensor_view(part, shape, dtype) for part in held]
        return [lambda w=w: function(args, w, y) for w in tensors]

    def _read(self) -> Callable[[], Any]:
        source = huge_zeros(_READ_BYTES)
        source[:: os.sysconf("SC_PAGE_SIZE")] = 1  # untouched pages are all the same page of zeros
        lanes, function = self.caps.lanes_f32, self._library[_READ]
        values = tensor_view(source, (_READ_BYTES // 4,), "int32")
        out = tensor_view(huge_zeros(4 * lanes * self.caps.threads), (self.caps.threads, lanes), "int32")
        return lambda: function(values, out)


def _symbol(kernel: Kernel) -> str:
    scheme, (outputs, inputs) = kernel
    return f"{scheme}_{outputs}_{inputs}"


def show(bench: Bench, shape: Shape, rows: int, times: dict[str, list[float]], limits: MachineLimits) -> None:
    """One line per kernel."""
    typical = min if bench.caps.threads == 1 else statistics.median
    best = {name: typical(values) for name, values in times.items()}
    read = _READ_BYTES / best[_READ] if _READ in best else None
    plain = best.get("bf16")
    for (scheme, of), _ in bench.stored.items():
        if of != shape:
            continue
        seconds = best[scheme]
        bandwidth = bench.nbytes((scheme, shape)) / seconds
        rate = 2 * rows * shape[0] * shape[1] / seconds
        kind = "int8" if scheme != "bf16" and by_name(scheme).activations is Code.INT else "bf16"
        peak = limits.multiply.get(kind, limits.multiply["f32"])
        cells = [
            f"{shape[0]} x {shape[1]}",
            str(rows),
            scheme,
            f"{1e6 * seconds:.0f}",
            f"{bandwidth / 1e9:.1f}",
            f"{bandwidth / read:.0%}" if read else "",
            f"{rate / 1e9:.0f}",
            f"{rate / peak:.0%}",
            f"{plain / seconds:.2f}" if plain else "",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    if read:
        print(f"| | {rows} | reading memory | | {read / 1e9:.1f} | 100% | | | |", flush=True)


def _shape(text: str) -> Shape:
    outputs, inputs = (int(size) for size in text.split("x"))
    return outputs, inputs


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("schemes", nargs="+", help="bf16, names as for --quant, or of stored weights (q4k, nf4f, ...)")
    add("--rows", type=int, nargs="+", default=[1, 8, 512])
    add("--shapes", type=_shape, nargs="+", default=[(8192, 2048)], metavar="OUTPUTSxINPUTS")
    add("--threads", type=int, default=1)
    add("--cold", type=int, default=16, help="rows up to which weights shall come from memory")
    add("--cycle", type=int, default=256, help="MiB of copies of such a weight")
    add("--seconds", type=float, default=0.3, help="to spend on each kernel")
    add("--prefetch", type=int, help="of the quantized kernels, in place of the default")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    require_permission(BACKEND.capabilities("").features)
    limits = measure(options.threads)
    caps = dataclasses.replace(BACKEND.capabilities(""), threads=options.threads)
    bench = Bench(options.schemes, options.shapes, caps, options.prefetch)
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.multiply.items())
    print(f"{caps.preset}, {options.threads} threads, load average {load:.1f}; GOP/s at most: {peaks}\n")
    print("| outputs x inputs | rows | scheme | us | weight GB/s | of read | GOP/s | of peak | bf16 = 1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for rows in options.rows:
            cycle = options.cycle << 20 if rows <= options.cold else 0
            show(bench, shape, rows, bench.times(shape, rows, cycle, options.seconds), limits)


if __name__ == "__main__":
    main()
