"""Everything about the cuda target that needs a GPU, in one command: right numbers, then speed, as a table.

    python tools/gpu_check.py                     # all of it; needs a driver for CUDA 13, torch with CUDA, and our wheels
    python tools/gpu_check.py --only gemv,gemm    # some parts
    python tools/gpu_check.py --dry-run           # here: compile all kernels that would be measured, and what they take

Times are medians of CUDA events after warm-up, kernel and torch in turn in the same process. Bandwidth is over the bytes
that a kernel must move, as a share of what a device-to-device copy moves; matmuls are compared with torch.matmul.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import cuda_driver
from llmc.ops import NormAttrs
from llmc.schedules.attention import AttentionConfig, partial_shape
from llmc.schedules.kernels import builders, with_defaults
from llmc.schedules.layout import linear_layout
from llmc.schedules.linear import LinearConfig
from llmc.schedules.norm import NormConfig
from llmc.targets.backend import get
from llmc.targets.cuda.build import build_kernels

PARTS = ("models", "copy", "norm", "gemv", "flat", "gemm", "prefill", "decode")
# outputs and inputs of the matmuls of an 8B Llama; the gated one has 2 x 14336 rows
SHAPES = {
    "qkv": (6144, 4096, False),
    "o": (4096, 4096, False),
    "gate_up": (14336, 4096, True),
    "down": (4096, 14336, False),
}
SQUARES = (4096, 8192)
HEADS = dict(heads=32, kv_heads=8, key_dim=128, value_dim=128, page_size=16, layers=1, scale=128**-0.5)


@dataclass(frozen=True)
class Row:
    """A line of the table: `ours` and `theirs` in microseconds; `share` of the copy's bandwidth or of `theirs`."""

    part: str
    what: str
    ours: float
    theirs: float | None
    share: float | None
    error: float | None


def linear_config(n: int, k: int, gated: bool = False) -> LinearConfig:
    return LinearConfig(
        n, k, "bfloat16", "bfloat16", "bfloat16", gated=gated, activation="silu" if gated else ""
    )


def kernels_of(caps: Any) -> dict[str, Any]:
    """Name -> PrimFunc of everything that is measured."""
    make = builders(caps)
    found = {f"linear_{name}": make.linear(linear_config(*s), caps) for name, s in SHAPES.items()}
    found |= {f"linear_{n}": make.linear(linear_config(n, n), caps) for n in SQUARES}
    attrs = NormAttrs(1e-5, has_weight=True)
    found["norm"] = make.norm(NormConfig((-1, 4096), "bfloat16", "bfloat16", attrs), caps)
    found["prefill"] = make.attention_prefill(attention_config(caps), caps)
    found["decode"] = make.attention_decode(attention_config(caps), caps, None)
    return found


def attention_config(caps: Any) -> AttentionConfig:
    config = AttentionConfig(dtype="bfloat16", kv_dtype="bfloat16", token_major=True, **HEADS)  # type: ignore[arg-type]
    return with_defaults(config, caps)


class Bench:
    """Compiled kernels on the GPU, and timing. Imports torch."""

    def __init__(self, caps: Any, names: list[str]) -> None:
        import torch

        from llmc.runtime import cuda
        from llmc.runtime.library import ffi

        self.torch, self.caps = torch, caps
        cuda.load_runtime()
        funcs = {name: func for name, func in kernels_of(caps).items() if name in names}
        host, images, _ = build_kernels(funcs, get(caps.preset)[0].tvm_target(caps), (caps.preset[5:],))
        host.import_module(cuda.module_from(next(iter(images.values()))))
        self._host, self._from_dlpack = host, ffi().from_dlpack
        self.copy_bandwidth = 0.0  # bytes per microsecond, read and written

    def call(self, name: str, *args: Any) -> Callable[[], None]:
        """A call of a kernel on torch tensors, to be timed."""
        function = self._host[name]
        tensors = [a if isinstance(a, int) else self._from_dlpack(a) for a in args]
        return lambda: function(*tensors)

    def random(self, *shape: int) -> Any:
        return self.torch.randn(*shape, device="cuda", dtype=self.torch.bfloat16)

    def empty(self, *shape: int, dtype: Any = None) -> Any:
        return self.torch.empty(*shape, device="cuda", dtype=dtype or self.torch.bfloat16)

    def integers(self, values: Any) -> Any:
        return self.torch.tensor(values, device="cuda", dtype=self.torch.int32)

    def times(self, *functions: Callable[[], Any], repeats: int = 30) -> list[float]:
        """Median microseconds of each, in turns; the second-level cache is overwritten in between."""
        cuda = self.torch.cuda
        spoiler = self.empty(256 << 20, dtype=self.torch.uint8)
        found: list[list[float]] = [[] for _ in functions]
        for turn in range(repeats + 5):
            for times, function in zip(found, functions, strict=True):
                spoiler.zero_()
                begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                end.synchronize()
                if turn >= 5:
                    times.append(1000 * begin.elapsed_time(end))
        return [statistics.median(t) for t in found]


def measure_copy(b: Bench) -> Iterator[Row]:
    source, target = b.empty(4 << 30, dtype=b.torch.uint8), b.empty(4 << 30, dtype=b.torch.uint8)
    (time,) = b.times(lambda: target.copy_(source), repeats=10)
    b.copy_bandwidth = 2 * source.nbytes / time
    yield Row("copy", f"4 GiB, {b.copy_bandwidth / 1e6:.2f} TB/s", time, None, None, None)


def measure_norm(b: Bench) -> Iterator[Row]:
    for rows in (1, 512, 4096):
        x, w, y = b.random(rows, 4096), b.random(4096), b.empty(rows, 4096)
        call = b.call("norm", x, w, y)
        theirs = lambda x=x, w=w: b.torch.nn.functional.rms_norm(x, (4096,), w, 1e-5)  # noqa: E731
        call()
        error = relative(y, theirs())
        ours, other = b.times(call, theirs)
        yield Row("norm", f"{rows} x 4096", ours, other, 4 * x.numel() / ours / b.copy_bandwidth, error)


def _linear(b: Bench, name: str, n: int, k: int, gated: bool, rows: int) -> tuple[Any, Any, float]:
    """(our call, torch's call, relative error)."""
    import numpy as np

    outputs = 2 * n if gated else n
    weight, x, y = b.random(outputs, k), b.random(rows, k), b.empty(rows, n)
    layout = linear_layout("bfloat16", b.caps)
    bits = weight.view(b.torch.int16).cpu().numpy()
    if gated:
        half = type(layout)(layout.n_block // 2, layout.k_pack)
        packed = np.concatenate([half.pack(bits[:n]), half.pack(bits[n:])], axis=2)
    else:
        packed = layout.pack(bits)
    stored = b.torch.from_numpy(packed).cuda().view(b.torch.bfloat16)
    call = b.call(f"linear_{name}", x, stored, y)

    def theirs() -> Any:
        sums = x @ weight.T
        return b.torch.nn.functional.silu(sums[:, :n]) * sums[:, n:] if gated else sums

    call()
    return call, theirs, relative(y, theirs())


def measure_gemv(b: Bench) -> Iterator[Row]:
    for name, (n, k, gated) in SHAPES.items():
        call, theirs, error = _linear(b, name, n, k, gated, 1)
        ours, other = b.times(call, theirs)
        size = 2 * n * k * (2 if gated else 1)
        yield Row("gemv", f"{name} {n} x {k}", ours, other, size / ours / b.copy_bandwidth, error)


def measure_flat(b: Bench) -> Iterator[Row]:
    for rows in (2, 4, 8, 16):
        for name, (n, k, gated) in SHAPES.items():
            call, theirs, error = _linear(b, name, n, k, gated, rows)
            ours, other = b.times(call, theirs)
            yield Row("flat", f"{rows} rows, {name}", ours, other, other / ours, error)


def measure_gemm(b: Bench) -> Iterator[Row]:
    for n in SQUARES:
        call, theirs, error = _linear(b, str(n), n, n, False, n)
        ours, other = b.times(call, theirs, repeats=10)
        yield Row("gemm", f"{n}^3, {2 * n**3 / ours / 1e6:.0f} TFLOP/s", ours, other, other / ours, error)


def _cache(b: Bench, context: int) -> tuple[Any, Any, Any]:
    pages = context // 16
    return (
        b.random(pages + 1, 1, 8, 128, 16),
        b.random(pages + 1, 1, 8, 16, 128),
        b.integers([list(range(1, pages + 1))]),
    )


def _plain(k_pool: Any, v_pool: Any) -> tuple[Any, Any]:
    """Keys and values as [1, heads, tokens, 128]."""
    k = k_pool[1:, 0].permute(1, 0, 3, 2).reshape(1, 8, -1, 128)
    v = v_pool[1:, 0].permute(1, 0, 2, 3).reshape(1, 8, -1, 128)
    return k.contiguous(), v.contiguous()


def measure_prefill(b: Bench) -> Iterator[Row]:
    for context in (4096, 16384):
        k_pool, v_pool, table = _cache(b, context)
        q, out = b.random(1, context, 32, 128), b.empty(1, context, 32, 128)
        start, length = b.integers([0, context]), b.integers([context])
        call = b.call("prefill", q, k_pool, v_pool, start, length, table, 0, out)
        k, v = _plain(k_pool, v_pool)
        theirs = lambda q=q, k=k, v=v: b.torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
            q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True
        )
        call()
        error = relative(out[0].transpose(0, 1), theirs()[0])
        ours, other = b.times(call, theirs, repeats=5)
        yield Row("prefill", f"{context} tokens", ours, other, other / ours, error)


def measure_decode(b: Bench) -> Iterator[Row]:
    cfg = attention_config(b.caps)
    for context in (4096, 32768):
        k_pool, v_pool, table = _cache(b, context)
        q, out = b.random(1, 1, 32, 128), b.empty(1, 1, 32, 128)
        partial = b.empty(1, *partial_shape(cfg), dtype=b.torch.float32)
        start, length = b.integers([0, 1]), b.integers([context])
        call = b.call("decode", q, k_pool, v_pool, start, length, table, 0, out, partial)
        k, v = _plain(k_pool, v_pool)
        theirs = lambda q=q, k=k, v=v: b.torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
            q.transpose(1, 2), k, v, enable_gqa=True
        )
        call()
        error = relative(out[0].transpose(0, 1), theirs()[0])
        ours, other = b.times(call, theirs)
        size = 2 * k.nbytes
        yield Row("decode", f"{context} tokens", ours, other, size / ours / b.copy_bandwidth, error)


def relative(found: Any, expected: Any) -> float:
    """Root mean square of the difference over that of the expected values."""
    difference = (found.float() - expected.float()).pow(2).mean().sqrt()
    return float(difference / expected.float().pow(2).mean().sqrt())


def check_models(preset: str) -> list[str]:
    """Compile tiny models for the GPU with the check against the source model, and compare greedy tokens with cpu's."""
    import llmc
    from llmc.pipeline import compile_model
    from tools.tiny_configs import tiny_model

    lines = []
    for architecture in ("llama", "gemma2", "gpt2"):
        model = tiny_model(architecture)
        tokens = []
        with tempfile.TemporaryDirectory() as work:
            for number, target in enumerate(("cpu", preset)):
                folder = Path(work) / str(number)
                compile_model(model, folder, target=target, dtype="f32")
                result = llmc.load(folder).generate([1, 2, 3], max_tokens=128, temperature=0.0)
                tokens.append([int(i) for i in result.token_ids])
        same = "equal" if tokens[0] == tokens[1] else "DIFFER from cpu"
        lines.append(f"{architecture}: checked against torch, {len(tokens[1])} greedy tokens {same}")
    return lines


_MEASURES: dict[str, tuple[Callable[[Bench], Iterator[Row]], tuple[str, ...]]] = {
    "copy": (measure_copy, ()),
    "norm": (measure_norm, ("norm",)),
    "gemv": (measure_gemv, tuple(f"linear_{s}" for s in SHAPES)),
    "flat": (measure_flat, tuple(f"linear_{s}" for s in SHAPES)),
    "gemm": (measure_gemm, tuple(f"linear_{n}" for n in SQUARES)),
    "prefill": (measure_prefill, ("prefill",)),
    "decode": (measure_decode, ("decode",)),
}


def dry_run(preset: str) -> None:
    """Compile everything and print what the kernels take."""
    backend, caps = get(preset)
    _, _, kernels = build_kernels(kernels_of(caps), backend.tvm_target(caps), tuple(preset[5:].split(",")))
    for k in kernels:
        print(
            f"{k.arch:8} {k.name:32} {k.registers:4} registers {k.shared_bytes:6} B shared {k.spill_bytes:5} B spilled"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--target", default="", help="default: the GPU at hand; with --dry-run cuda/sm_90")
    parser.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.dry_run:
        dry_run(options.target or "cuda/sm_90")
        return 0
    driver = cuda_driver.query()
    if not driver.devices:
        print(f"gpu_check needs a GPU, and {driver.problem}. Use --dry-run here.", file=sys.stderr)
        return 2
    parts = [p for p in PARTS if p in options.only.split(",")]
    _, caps = get(options.target or "cuda")
    print(f"{driver.devices[0].name}, driver for CUDA {driver.version_text}, {caps.preset}")
    if "models" in parts:
        print("\n".join(check_models(caps.preset)))
    measured = [
        "copy",
        *(p for p in parts if p not in ("copy", "models")),
    ]  # the others need the copy's bandwidth
    bench = Bench(caps, [name for p in measured for name in _MEASURES[p][1]])
    rows = []
    for part in measured:
        for row in _MEASURES[part][0](bench):
            rows.append(row)
            cells = [f"{v:.3g}" if v is not None else "-" for v in (row.theirs, row.share, row.error)]
            print(
                f"{row.part:8} {row.what:28} {row.ours:9.1f} us  torch {cells[0]:>8}  share {cells[1]:>6}  error {cells[2]}"
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
