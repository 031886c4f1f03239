"""Kernels on tile registers (AMX) against the kernels on vectors and against the peak of the unit, on a machine that has it.

    python tools/bench_tiles.py                       # bf16, w8a8, w4a8, q4g32; 16 to 512 rows; two threads
    python tools/bench_tiles.py --schemes bf16 --sweep --rows 512

First the peaks are measured by loops on registers. Then every kernel is checked against the one on vectors, and timed in
turns with it; the figure is the median. Weights come from memory: copies that together are three times the last-level cache
take turns, unless --copies 1. `--sweep` times schedules one field at a time. `--emulate` runs the same on any machine with
emulated operations, to check this script; its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BF16 = "bfloat16"
SHAPES = ((8192, 2048), (2048, 8192), (3072, 2048))
# one field at a time
SWEEP: tuple[dict[str, Any], ...] = (
    *({"tile_rows": v} for v in (64, 128, 256, 512)),
    *({"tile_columns": v} for v in (128, 256, 512, 1024)),
    *({"tile_blocks": v} for v in (1, 2, 4)),
    *({"tile_unroll": v} for v in (1, 4)),
    {"tile_prefetch": False},
    {"tile_wide": True},
    {"tile_wide": True, "tile_columns": 128},
    {"tile_rows": 512, "tile_columns": 512},
)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        import tvm

        from llmc.caps import TileUnit
        from llmc.host import require_permission
        from llmc.targets.cpu.backend import BACKEND

        self.tvm, self.options, self.backend = tvm, options, BACKEND
        caps = BACKEND.capabilities("")
        if options.emulate:
            caps = replace(caps, tiles=TileUnit.EMULATED)
        elif caps.tiles is TileUnit.NONE:
            sys.exit("This processor has no tile registers (AMX); --emulate checks the script without them.")
        require_permission(caps.features)
        self.caps = replace(caps, threads=options.threads)

    def build(self, functions: dict[str, Any]) -> Any:
        from llmc.targets.codegen import tir_pipeline

        module = self.tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
        return self.tvm.compile(
            module, target=self.backend.tvm_target(self.caps), tir_pipeline=tir_pipeline()
        )

    def peaks(self) -> dict[str, float]:
        """Operations per second of all threads on registers."""
        import numpy as np

        from llmc.schedules.limits import TILE_KINDS, multiply_kernel

        library = self.build({k.operands: multiply_kernel(k, self.caps) for k in TILE_KINDS})
        out = {}
        for kind in TILE_KINDS:
            operands = self.tvm.runtime.tensor(np.zeros((2, 16), np.int32))
            result = self.tvm.runtime.tensor(np.zeros((self.caps.threads, 16), kind.dtype))
            turns = 10 if self.options.emulate else 20_000
            best = min(
                _seconds(lambda o=operands, r=result, k=kind, n=turns: library[k.operands](o, r, n))
                for _ in range(self.options.rounds)
            )
            out[kind.operands] = kind.operations(16) * turns * self.caps.threads / best
            print(
                f"peak {kind.operands}: {out[kind.operands] / 1e9:.0f} Gop/s on {self.caps.threads} threads"
            )
        return out

    def kernels(self, scheme: str, n: int, k: int, variants: list[dict[str, Any]]) -> tuple[Any, Any]:
        """(library with functions "vectors" and "tilesI", packed weight)."""
        import ml_dtypes
        import numpy as np

        from llmc.quant.rtn import quantize
        from llmc.quant.schemes import by_name
        from llmc.schedules.choice import ByRows
        from llmc.schedules.linear import LinearConfig, LinearSchedule
        from llmc.schedules.qlayout import quant_layout
        from llmc.schedules.qlinear import QuantLinearConfig
        from llmc.schedules.tile_linear import linear_by_rows
        from llmc.schedules.tune_qlinear import quant_linear_by_rows

        weight = np.random.default_rng(0).standard_normal((n, k), np.float32)
        fields = [{"tiles_from": 0}, *({"tiles_from": 1, **v} for v in variants)]
        names = ["vectors", *(f"tiles{i}" for i in range(len(variants)))]
        if scheme == "bf16":
            plain = LinearConfig(n, k, BF16, BF16, BF16)
            packed = plain.weight_layout(self.caps).pack(weight.astype(ml_dtypes.bfloat16))
            configs = [replace(plain, schedule=ByRows((LinearSchedule(**f),))) for f in fields]
            functions = [linear_by_rows(c, self.caps) for c in configs]
        else:
            layout = quant_layout(by_name(scheme), n, k, self.caps)
            packed = layout.pack(quantize(weight, by_name(scheme)))
            prefetch = {"prefetch": 0} if layout.quads else {}
            functions = [
                quant_linear_by_rows(QuantLinearConfig(n, layout, BF16, BF16, **prefetch, **f), self.caps)
                for f in fields
            ]
        return self.build(dict(zip(names, functions, strict=True))), packed

    def shape(self, scheme: str, n: int, k: int, peaks: dict[str, float]) -> None:
        """Rows of the table for one weight."""
        import ml_dtypes
        import numpy as np

        from llmc.host import cache_bytes
        from llmc.runtime.library import tensor_view
        from llmc.runtime.memory import huge_zeros

        variants: list[dict[str, Any]] = [{}, *(SWEEP if self.options.sweep else ())]
        library, packed = self.kernels(scheme, n, k, variants)
        peak = peaks["int8" if scheme.startswith("w") else "bf16"]
        copies = self.options.copies or min(64, 3 * cache_bytes() // packed.nbytes + 1)
        weights = []
        for _ in range(copies):
            memory = huge_zeros(packed.nbytes)
            memory[:] = packed.reshape(-1).view(np.uint8)
            weights.append(tensor_view(memory, packed.shape, str(packed.dtype)))
        rng = np.random.default_rng(1)
        for rows in self.options.rows:
            x = self.tvm.runtime.tensor(rng.standard_normal((rows, k), np.float32).astype(ml_dtypes.bfloat16))
            names = ["vectors", *(f"tiles{i}" for i in range(len(variants)))]
            y = {name: self.tvm.runtime.tensor(np.zeros((rows, n), ml_dtypes.bfloat16)) for name in names}
            times: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(self.options.rounds + 1):
                for name in names:
                    weight = weights[turn % copies]
                    took = _seconds(lambda f=library[name], x=x, w=weight, o=y[name]: f(x, w, o))
                    if turn:  # the first one warms up
                        times[name].append(took)
            expected = y["vectors"].numpy().astype(np.float32)
            for i, variant in enumerate(variants):
                found = y[f"tiles{i}"].numpy().astype(np.float32)
                if not np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max():
                    sys.exit(f"wrong result: {scheme} {n}x{k}, {rows} rows, {variant}")
                ours = statistics.median(times[f"tiles{i}"])
                vectors = statistics.median(times["vectors"])
                rate = 2 * rows * n * k / ours
                text = " ".join(f"{key.removeprefix('tile_')}={value}" for key, value in variant.items())
                print(
                    f"| {scheme} | {n}x{k} | {rows} | {text or 'default'} | {ours * 1e6:.0f} | {vectors * 1e6:.0f} "
                    f"| {vectors / ours:.2f} | {rate / 1e9:.0f} | {100 * rate / peak:.0f} | {packed.nbytes / ours / 1e9:.1f} |",
                    flush=True,
                )


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", nargs="+", default=["bf16", "w8a8", "w4a8", "q4g32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[9, 16, 32, 64, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="OUTPUTSxINPUTS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--copies", type=int, default=0, help="of a weight; 0 = three times the cache")
    parser.add_argument("--sweep", action="store_true", help="other schedules than the default too")
    parser.add_argument(
        "--emulate", action="store_true", help="check the script on a machine without the unit"
    )
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when tvm starts its threads
    bench = Bench(options)
    peaks = bench.peaks()
    print(
        "\n| weights | shape | rows | schedule | us | us, vectors | faster | Gop/s | % of peak | weight GB/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for scheme in options.schemes:
        for shape in options.shapes:
            n, _, k = shape.partition("x")
            bench.shape(scheme, int(n), int(k), peaks)


if __name__ == "__main__":
    main()
