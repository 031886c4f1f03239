"""Speed of the CPU kernels against torch in one process: python tools/bench_kernels.py [--threads 2] [--only gemv].

Shapes of a 1.2B Llama (hidden 2048, 32/8 heads of 64, MLP 8192, vocabulary 128256), bf16. Weights and pages do not fit in
the caches: each kernel cycles over several copies. Medians; the ratio is torch's time over ours.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

_HUGE = 2 << 20


def huge(shape: tuple[int, ...], advise: bool) -> np.ndarray:
    """Zeroed bf16 memory at a 2 MiB boundary, with transparent huge pages if `advise`."""
    size = int(np.prod(shape)) * 2
    block = mmap.mmap(-1, size + _HUGE)
    if advise:
        block.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(block, np.uint8)
    start = -raw.ctypes.data % _HUGE
    return raw[start : start + size].view(ml_dtypes.bfloat16).reshape(shape)


def median_pair(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of both, taken in turn; a pause lets the other pool's threads stop spinning."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for kept, call in zip(times, (ours, theirs), strict=True):
            time.sleep(0.02)
            begin = time.perf_counter()
            call()
            if i:
                kept.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


class Bench:
    """Builds kernels for this machine and prints one row per measurement."""

    def __init__(self, threads: int, advise: bool, rounds: int) -> None:
        import torch
        import tvm

        from llmc.host import require_permission
        from llmc.targets.cpu.backend import capabilities, tvm_target

        self.torch, self.tvm = torch, tvm
        torch.set_num_threads(threads)
        self.caps = capabilities("")
        require_permission(self.caps.features)
        self.target = tvm_target(self.caps)
        self.advise, self.rounds = advise, rounds
        self.rng = np.random.default_rng(0)

    def build(self, func: Any) -> Any:
        module = self.tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
        self._keep = self.tvm.compile(module, target=self.target)
        return self._keep["k"]

    def tensor(self, array: np.ndarray) -> Any:
        return self.tvm.runtime.from_dlpack(array) if array.dtype != ml_dtypes.bfloat16 else self._bf16(array)

    def _bf16(self, array: np.ndarray) -> Any:
        view = self.torch.from_numpy(array.view(np.uint16)).view(self.torch.bfloat16)
        return self.tvm.runtime.from_dlpack(view)

    def random(self, *shape: int) -> np.ndarray:
        out = huge(shape, self.advise)
        piece = self.rng.standard_normal(1 << 16).astype(ml_dtypes.bfloat16)
        np.copyto(out.reshape(-1), np.resize(piece, out.size))
        return out

    def row(self, name: str, ours: float, theirs: float, work: float, unit: str) -> None:
        print(
            f"{name:34s} {ours * 1e3:9.3f} ms {work / ours:8.1f} {unit}"
            f"   torch {theirs * 1e3:9.3f} ms {work / theirs:8.1f} {unit}   ratio {theirs / ours:5.2f}",
            flush=True,
        )

    def linear(self, rows: int, n: int, k: int) -> None:
        from llmc.schedules.layout import linear_layout
        from llmc.schedules.linear import LinearConfig
        from llmc.schedules.tile_linear import linear_by_rows

        torch = self.torch
        cfg = LinearConfig(n, k, "bfloat16", "bfloat16", "bfloat16", lead=1)
        kernel = self.build(linear_by_rows(cfg, self.caps))
        layout = linear_layout("bfloat16", self.caps)
        copies = 1 if rows > 16 else max(1, (256 << 20) // (n * k * 2))
        packed = [self.tensor(self.random(*layout.packed_shape(n, k))) for _ in range(copies)]
        plain = [
            torch.from_numpy(self.random(n, k).view(np.uint16)).view(torch.bfloat16) for _ in range(copies)
        ]
        x = self.random(1, rows, k)
        xt = torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)[0]
        a, y = self.tensor(x), self.tensor(huge((1, rows, n), self.advise))
        ours, theirs = median_pair(
            lambda: [kernel(a, w, y) for w in packed],
            lambda: [torch.nn.functional.linear(xt, w) for w in plain],
            self.rounds,
        )
        ours, theirs = ours / copies, theirs / copies
        if rows <= 16:
            self.row(f"linear T={rows} {n}x{k}", ours, theirs, n * k * 2 / 1e9, "GB/s")
        else:
            self.row(f"linear T={rows} {n}x{k}", ours, theirs, 2 * rows * n * k / 1e9, "GF/s")

    def attention(self, kind: str, length: int, heads: int, kv_heads: int, dim: int) -> None:
        from llmc.schedules.attention import (
            AttentionConfig,
            attention_decode,
            attention_prefill,
            partial_shape,
        )

        torch = self.torch
        page = 32
        cfg = AttentionConfig(heads, kv_heads, dim, dim, "bfloat16", "bfloat16", page, 1, dim**-0.5)
        decode = kind == "decode"
        kernel = self.build((attention_decode if decode else attention_prefill)(cfg, self.caps))
        copies = max(1, (128 << 20) // (length * kv_heads * dim * 4)) if decode else 1
        pages = 1 + length // page
        new = 1 if decode else length
        pools = [
            (
                self.tensor(self.random(pages, 1, kv_heads, dim, page)),
                self.tensor(self.random(pages, 1, kv_heads, page, dim)),
            )
            for _ in range(copies)
        ]
        table = self.rng.permutation(np.arange(1, pages)).astype(np.int32)[None]
        q = self.random(1, heads, new, dim)
        out = huge((1, new, heads, dim), self.advise)
        start, context = np.array([0, new], np.int32), np.array([length], np.int32)
        args = [self.tvm.runtime.tensor(x) for x in (start, context, table)]
        tail: list[Any] = [0, self.tensor(out)]
        if decode:
            tail.append(self.tvm.runtime.tensor(np.zeros((1, *partial_shape(cfg)), np.float32)))
        qk = self.tensor(q)
        qt = torch.from_numpy(q.view(np.uint16)).view(torch.bfloat16)
        kv = [
            tuple(
                torch.from_numpy(self.random(1, kv_heads, length, dim).view(np.uint16)).view(torch.bfloat16)
                for _ in range(2)
            )
            for _ in range(copies)
        ]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        ours, theirs = median_pair(
            lambda: [kernel(qk, k, v, *args, *tail) for k, v in pools],
            lambda: [sdpa(qt, k, v, is_causal=not decode, enable_gqa=heads != kv_heads) for k, v in kv],
            self.rounds,
        )
        ours, theirs = ours / copies, theirs / copies
        name = f"{kind} S={length} {heads}/{kv_heads}x{dim}"
        if decode:
            self.row(name, ours, theirs, length * kv_heads * dim * 4 / 1e9, "GB/s")
        else:
            self.row(name, ours, theirs, 2 * length * length * heads * dim / 1e9, "GF/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="gemv, flat, gemm, prefill or decode")
    parser.add_argument("--no-huge", action="store_true", help="plain 4 KiB pages")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    bench = Bench(options.threads, not options.no_huge, options.rounds)
    shapes = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))
    call = functools.partial
    table: dict[str, list[Callable[[], None]]] = {
        "gemv": [call(bench.linear, 1, *s) for s in (*shapes, (128256, 2048))],
        "flat": [call(bench.linear, rows, 8192, 2048) for rows in (2, 4, 8, 16)],
        "gemm": [call(bench.linear, 512, *s) for s in shapes],
        "prefill": [call(bench.attention, "prefill", 1024, 32, 8, dim) for dim in (64, 128)],
        "decode": [call(bench.attention, "decode", keys, 32, 8, 64) for keys in (2048, 8192)],
    }
    for name, runs in table.items():
        if options.only in ("", name):
            for run in runs:
                run()


if __name__ == "__main__":
    main()
