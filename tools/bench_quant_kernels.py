"""Speed of the linear kernels on quantized weights against the bf16 kernel, one thread, in one process.

    python tools/bench_quant_kernels.py q4g32 w4a8 nf4 --rows 1 8 512 --outputs 8192 --inputs 2048

Up to 16 rows every call reads another copy of the weight, so that it comes from memory; with more rows the copy stays.
All kernels take turns, round by round; the figure is the best processor time of the calling thread, which other programs
disturb least. Activations are bf16.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TVM_NUM_THREADS"] = "1"  # read when tvm starts its threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ml_dtypes
import numpy as np
import tvm

from llmc.host import require_permission
from llmc.quant.schemes import by_name
from llmc.schedules.linear import LinearConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tile_linear import linear_by_rows
from llmc.schedules.tune_qlinear import quant_linear_by_rows
from llmc.targets.codegen import tir_pipeline
from llmc.targets.cpu.backend import BACKEND

_BF16 = "bfloat16"
_CACHE = 200 << 20  # copies of a weight take more than any cache holds
_FROM_MEMORY = 16  # rows up to which weights shall come from memory


def compiled(schemes: list[str], outputs: int, inputs: int) -> tuple[Any, dict[str, np.ndarray]]:
    """The kernels by name, and a packed weight of random bytes for each (their values do not change the time)."""
    caps = BACKEND.capabilities("")
    plain = LinearConfig(outputs, inputs, _BF16, _BF16, _BF16)
    functions = {"bf16": linear_by_rows(plain, caps).with_attr("global_symbol", "bf16")}
    random = np.random.default_rng(0)
    weights = {
        "bf16": random.standard_normal(plain.packed_shape(caps), np.float32).astype(ml_dtypes.bfloat16)
    }
    for name in schemes:
        layout = quant_layout(by_name(name), outputs, inputs, caps)
        prefetch = {"prefetch": 0} if layout.quads else {}  # as LowerLinear
        config = QuantLinearConfig(outputs, layout, _BF16, _BF16, **prefetch)
        functions[name] = quant_linear_by_rows(config, caps).with_attr("global_symbol", name)
        # bytes below 64 are finite numbers also where they are scales
        weights[name] = random.integers(0, 64, layout.packed_shape, np.uint8)
    target = BACKEND.tvm_target(caps)
    return tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline=tir_pipeline()), weights


def measure(
    library: Any, weights: dict[str, np.ndarray], rows: int, sizes: tuple[int, int], rounds: int
) -> dict:
    """Best seconds per call of each kernel."""
    outputs, inputs = sizes
    x = np.random.default_rng(1).standard_normal((rows, inputs), np.float32).astype(ml_dtypes.bfloat16)
    x, y = tvm.runtime.tensor(x), tvm.runtime.tensor(np.zeros((rows, outputs), ml_dtypes.bfloat16))
    copies = {
        name: [tvm.runtime.tensor(w) for _ in range(_CACHE // w.nbytes + 1 if rows <= _FROM_MEMORY else 1)]
        for name, w in weights.items()
    }
    best = dict.fromkeys(weights, float("inf"))
    for _ in range(rounds):
        for name, held in copies.items():
            kernel = library[name]
            for weight in held:
                start = time.thread_time()
                kernel(x, weight, y)
                best[name] = min(best[name], time.thread_time() - start)
    return best


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "schemes", nargs="+", help="names as for --quant, or of stored weights (q4k, nf4f, ...)"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    require_permission(BACKEND.capabilities("").features)
    library, weights = compiled(options.schemes, options.outputs, options.inputs)
    print(f"{options.outputs} x {options.inputs}, one thread, load average {os.getloadavg()[0]:.1f}\n")
    print("| rows | scheme | us per call | weight GB/s | GOP/s | against bf16 |")
    print("|---|---|---|---|---|---|")
    for rows in options.rows:
        best = measure(library, weights, rows, (options.outputs, options.inputs), options.rounds)
        for name, seconds in best.items():
            operations = 2 * rows * options.outputs * options.inputs
            print(
                f"| {rows} | {name} | {1e6 * seconds:.0f} | {weights[name].nbytes / seconds / 1e9:.1f} | "
                f"{operations / seconds / 1e9:.0f} | {best['bf16'] / seconds:.2f} |"
            )


if __name__ == "__main__":
    main()
