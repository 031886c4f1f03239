"""CPU attention on cache pages of several types, taken in turn: python tools/bench_pages.py [--keys 8192] [--threads 2].

Attention of the llama-1b shape (32/8 heads of 64) in bfloat16. Each call reads the pools of one of several layers, which
together fit no cache, as a decode step does; figures are medians of the time of a layer. Prefill reads a prompt of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from llmc.kv_plan import KV_DTYPES, entry_bytes
from llmc.schedules.attention import AttentionConfig, attention_decode, attention_prefill, partial_shape
from llmc.schedules.kv_arrays import coded_part

_LAYERS_BYTES = 256 << 20  # of pools in bfloat16


class Bench:
    """Kernels and pools of one type of pages.

    Args:
        keys: of the sequence.
        new: tokens that are queried; 1 is decode.
    """

    def __init__(self, kv_dtype: str, keys: int, new: int, page: int, layers: int, preset: str) -> None:
        import tvm

        from llmc.runtime.library import tensor_view
        from llmc.runtime.memory import huge_zeros
        from llmc.targets.codegen import tir_pipeline
        from llmc.targets.cpu.backend import capabilities, tvm_target

        caps = capabilities(preset)
        cfg = AttentionConfig(32, 8, 64, 64, "bfloat16", "bfloat16", page, 1, 64**-0.5)
        cfg = self.cfg = replace(cfg, kv_dtype=kv_dtype)
        func = (attention_decode if new == 1 else attention_prefill)(cfg, caps)
        module = tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
        self._library = tvm.compile(module, target=tvm_target(caps), tir_pipeline=tir_pipeline())
        self._kernel = self._library["k"]
        rng = np.random.default_rng(0)
        pages = 1 + keys // page
        rows = rng.standard_normal((pages, 1, cfg.kv_heads, page, 64), np.float32)
        self._pools: list[tuple[Any, Any]] = []
        for _ in range(layers):
            pair = []
            for dims_first, shape in ((True, cfg.k_page), (False, cfg.v_page)):
                if cfg.coded:
                    data = coded_part(rows, kv_dtype, keys=dims_first)
                else:
                    ordered = rows.swapaxes(-1, -2) if dims_first else rows
                    kinds = {"bfloat16": ml_dtypes.bfloat16}
                    data = np.ascontiguousarray(ordered).astype(kinds.get(kv_dtype, kv_dtype))
                raw = huge_zeros(data.nbytes)
                raw[:] = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
                pair.append(tensor_view(raw, (pages, 1, cfg.kv_heads, *shape), cfg.pool_dtype))
            self._pools.append((pair[0], pair[1]))
        tensor = tvm.runtime.tensor
        table = rng.permutation(np.arange(1, pages)).astype(np.int32)[None]
        q = rng.standard_normal((1, cfg.heads, new, 64)).astype(ml_dtypes.bfloat16)
        self.out = tensor(np.zeros((1, new, cfg.heads, 64), ml_dtypes.bfloat16))
        start, context = np.array([0, new], np.int32), np.array([keys], np.int32)
        self._head = tensor(q)
        self._tail: list[Any] = [tensor(start), tensor(context), tensor(table), 0, self.out]
        if new == 1:
            self._tail.append(tensor(np.zeros((1, *partial_shape(cfg)), np.float32)))

    def run(self) -> float:
        """Seconds per layer."""
        begin = time.perf_counter()
        for k, v in self._pools:
            self._kernel(self._head, k, v, *self._tail)
        return (time.perf_counter() - begin) / len(self._pools)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--new", type=int, default=1, help="tokens that are queried; 1: decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=0, help="default: as many as exceed the caches")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--target", default="", help="preset, e.g. x86-64-v3")
    parser.add_argument("--dtypes", default="bfloat16,int8,float8_e4m3fn", help=f"of {', '.join(KV_DTYPES)}")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    layers = options.layers or (max(1, _LAYERS_BYTES // (options.keys * 2048)) if options.new == 1 else 1)
    benches = [
        Bench(d, options.keys, options.new, options.page_size, layers, options.target)
        for d in options.dtypes.split(",")
    ]
    times: list[list[float]] = [[] for _ in benches]
    for i in range(options.rounds + 1):
        for kept, bench in zip(times, benches, strict=True):
            took = bench.run()
            if i:
                kept.append(took)
    first = statistics.median(times[0])
    for bench, kept in zip(benches, times, strict=True):
        took, size = statistics.median(kept), options.keys * 16 * entry_bytes(bench.cfg.kv_dtype, 64)
        print(
            f"{bench.cfg.kv_dtype:14s} {took * 1e6:9.1f} us per layer  {size / took / 1e9:6.1f} GB/s"
            f"  {first / took:5.2f} x {benches[0].cfg.kv_dtype}",
            flush=True,
        )


if __name__ == "__main__":
    main()
