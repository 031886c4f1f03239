"""Every kernel of schedules/gpu in the simulator against numpy: numbers, races, bounds and barriers."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.ops import HeadsAttrs, NormAttrs, Run
from llmc.schedules import norm as cpu_norm
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.gather import EmbeddingConfig, GatherConfig
from llmc.schedules.gpu.attention import attention_decode, attention_prefill
from llmc.schedules.gpu.gather import embedding, gather_rows
from llmc.schedules.gpu.linear import linear
from llmc.schedules.gpu.norm import norm
from llmc.schedules.gpu.rope import kv_append, rope_append
from llmc.schedules.gpu.topk import TopKConfig, top_k
from llmc.schedules.layout import linear_layout
from llmc.schedules.linear import LinearConfig
from llmc.schedules.rope import HeadSource, RopeConfig
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu

TOOLS = SimulatedTools()
RNG = np.random.default_rng(0)


def _slow(cases: list[Any]) -> list[Any]:
    """Cases of the slow run only."""
    return [pytest.param(c, marks=pytest.mark.slow) for c in cases]


def test_no_kernel_names_a_target() -> None:
    """Schedules ask the capabilities; a name of a target or an architecture in one is a mistake."""
    for path in Path(__file__).parents[2].glob("schedules/gpu/*.py"):
        texts = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        assert not [t for t in texts if isinstance(t, str) and t.startswith(("cuda", "sm_"))], path


RMS = NormAttrs(1e-5, has_weight=True)
LAYER = NormAttrs(1e-5, has_weight=True, has_bias=True, center=True)


@pytest.mark.parametrize(
    ("attrs", "dtype", "k"),
    [
        (RMS, "float32", 96),
        (replace(RMS, rounds_first=True, adds=True), "bfloat16", 300),
        (LAYER, "float32", 1500),
        (replace(RMS, plus_one=True, adds=True), "float16", 33),
        (replace(RMS, adds=True, before=LAYER), "bfloat16", 200),
        (replace(RMS, adds=True, before=replace(RMS, plus_one=True), only_sum=True), "float32", 96),
    ],
)
def test_norm(attrs: NormAttrs, dtype: str, k: int) -> None:
    cfg = cpu_norm.NormConfig((1, -1, k), dtype, dtype, attrs)
    kernel = TOOLS.build(gpu(), k=norm(cfg, gpu()))["k"]
    x, addend = (TOOLS.random(RNG, (1, 3, k), dtype) for _ in range(2))
    vectors = [TOOLS.random(RNG, (k,), dtype) for _ in range(cfg.vectors)]
    total, y = (TOOLS.tensor(np.full((1, 3, k), np.nan, DTYPES[dtype])) for _ in range(2))
    args = [x, *([addend] if attrs.adds else []), *vectors]
    results = [total] * attrs.adds + [y] * (not attrs.only_sum)
    kernel(*(TOOLS.tensor(a) for a in args), *results)
    value, rest = x.astype(np.float64), list(vectors)

    def normalised(value: np.ndarray, attrs: NormAttrs) -> np.ndarray:
        if attrs.center:
            value = value - value.mean(-1, keepdims=True)
        value = value / np.sqrt((value**2).mean(-1, keepdims=True) + attrs.eps)
        value = value * (rest.pop(0).astype(np.float64) + attrs.plus_one)
        return value + rest.pop(0).astype(np.float64) if attrs.has_bias else value

    if attrs.adds:
        other = addend.astype(np.float64)
        if attrs.before is not None:
            other = normalised(other, attrs.before)
        value = (value + other).astype(np.float32).astype(DTYPES[dtype]).astype(np.float64)
        assert np.abs(total.numpy().astype(np.float64) - value).max() < 4 * TOOLS.exact[dtype]
        value = total.numpy().astype(np.float64)
    if not attrs.only_sum:
        value = normalised(value, attrs)
        assert np.abs(y.numpy().astype(np.float64) - value).max() < 4 * TOOLS.exact[dtype]


@pytest.mark.parametrize("packed", [False, True])
def test_gathers(packed: bool) -> None:
    layout = linear_layout("bfloat16", gpu()) if packed else None
    cfg = EmbeddingConfig(21, 37, "bfloat16", lead=1, layout=layout)
    table = TOOLS.random(RNG, (21, 37), "bfloat16")
    ids = np.array([[3, 0, 20, 3]], np.int32)
    out = TOOLS.tensor(np.zeros((1, 4, 37), DTYPES["bfloat16"]))
    stored = layout.pack(table) if layout else table
    TOOLS.build(gpu(), k=embedding(cfg, gpu()))["k"](TOOLS.tensor(ids), TOOLS.tensor(stored), out)
    np.testing.assert_array_equal(out.numpy(), table[ids])
    rows = np.array([2, 2, 0], np.int32)
    picked = TOOLS.tensor(np.zeros((1, 3, 37), DTYPES["bfloat16"]))
    kernel = TOOLS.build(gpu(), k=gather_rows(GatherConfig(37, "bfloat16", 1), gpu()))["k"]
    kernel(out, TOOLS.tensor(rows), picked)
    np.testing.assert_array_equal(picked.numpy(), table[ids][:, rows])


LINEAR = [
    # n, k, dtype, out, options: tails everywhere, exact tiles, columns that do not fill 16 bytes
    (40, 64, "float32", "float32", {}),
    (70, 160, "bfloat16", "float32", {"has_bias": True, "has_residual": True}),
    (20, 64, "bfloat16", "bfloat16", {"gated": True, "activation": "silu", "has_bias": True}),
    (13, 27, "float32", "float32", {"has_bias": True}),
    (72, 96, "bfloat16", "bfloat16", {"has_residual": True}),
    (24, 37, "float16", "float16", {"activation": "gelu_tanh"}),
    (68, 128, "float16", "float16", {"gated": True, "gate_second": True, "activation": "gelu"}),
]
ACTIVATIONS = {
    "": lambda v: v,
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + np.vectorize(__import__("math").erf)(v / np.sqrt(2))),
    "gelu_tanh": lambda v: v * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
}


@pytest.mark.parametrize("case", [*LINEAR[:3], *_slow(LINEAR[3:])], ids=lambda c: "-".join(map(str, c[:3])))
@pytest.mark.parametrize("preset", ["sm_90", *_slow(["sm_75"])])
def test_linear(case: tuple[Any, ...], preset: str) -> None:
    n, k, dtype, out_dtype, options = case
    caps = gpu(preset)
    cfg = LinearConfig(n, k, dtype, dtype, out_dtype, lead=1, **options)
    kernel = TOOLS.build(caps, k=linear(cfg, caps))["k"]
    outputs = 2 * n if cfg.gated else n
    weight, bias = TOOLS.random(RNG, (outputs, k), dtype), TOOLS.random(RNG, (outputs,), dtype)
    for rows in (1, 3, 16, 37):
        x, residual = TOOLS.random(RNG, (1, rows, k), dtype), TOOLS.random(RNG, (1, rows, n), dtype)
        y = TOOLS.tensor(np.full((1, rows, n), np.nan, DTYPES[out_dtype]))
        extra = [bias] * cfg.has_bias + [residual] * cfg.has_residual
        kernel(TOOLS.tensor(x), TOOLS.tensor(_packed(cfg, caps, weight)), *map(TOOLS.tensor, extra), y)
        sums = x.astype(np.float64) @ weight.astype(np.float64).T + (bias if cfg.has_bias else 0)
        act = ACTIVATIONS[cfg.activation]
        if cfg.gated:
            gate, other = sums[..., :n], sums[..., n:]
            sums = act(other) * gate if cfg.gate_second else act(gate) * other
        else:
            sums = act(sums)
        sums = sums + (residual if cfg.has_residual else 0)
        error = np.abs(y.numpy().astype(np.float64) - sums).max() / np.abs(sums).max()
        assert error < TOOLS.exact[out_dtype] / 2, rows


def _packed(cfg: LinearConfig, caps: Any, weight: np.ndarray) -> np.ndarray:
    layout = linear_layout(cfg.weight_dtype, caps)
    if not cfg.gated:
        return layout.pack(weight)
    half = replace(layout, n_block=layout.n_block // 2)
    first, second = half.pack(weight[: cfg.n]), half.pack(weight[cfg.n :])
    return np.concatenate([first, second], axis=2)


BASE = AttentionConfig(
    heads=4,
    kv_heads=2,
    key_dim=16,
    value_dim=16,
    dtype="float32",
    kv_dtype="float32",
    page_size=16,
    layers=2,
    scale=0.25,
)


@pytest.mark.parametrize(
    "case",
    ["f32", *_slow(["bf16-window-sinks-dims", "chunk-softcap", "alibi-sinks-bf16-pages", "wide"])],
)
def test_attention(case: str) -> None:
    from tests.schedules.test_attention import CASES, run

    cfg = replace(BASE, **CASES[case], sinks_dtype="")
    kernels = TOOLS.build(
        gpu(),
        append=kv_append(cfg, gpu()),
        prefill=attention_prefill(cfg, gpu()),
        decode=attention_decode(cfg, gpu()),
    )
    for batch in ([(5, 5), (1, 33), (40, 70)], [(1, 1)], [(3, 300)]):
        assert run(cfg, TOOLS, kernels, batch, decode=False) < TOOLS.exact[cfg.dtype] * 2, batch
    for batch in ([(1, 1), (1, 600), (1, 33)], [(1, 1500)]):
        assert run(cfg, TOOLS, kernels, batch, decode=True) < TOOLS.exact[cfg.dtype], batch


def test_attention_with_more_heads_per_cached_head_than_a_tile_takes() -> None:
    from tests.schedules.test_attention import run

    cfg = replace(BASE, heads=40, kv_heads=1)
    kernels = TOOLS.build(
        gpu(),
        append=kv_append(cfg, gpu()),
        prefill=attention_prefill(cfg, gpu()),
        decode=attention_decode(cfg, gpu()),
    )
    assert run(cfg, TOOLS, kernels, [(3, 20), (2, 2)], decode=False) < 4e-6
    assert run(cfg, TOOLS, kernels, [(1, 20), (1, 400)], decode=True) < 4e-6


def rope_config(dtype: str, norm: NormAttrs | None = None, kv_dtype: str = "") -> RopeConfig:
    """q, k and v in one row of a projection, rotated in halves."""
    attention = replace(BASE, token_major=True, dtype=dtype, kv_dtype=kv_dtype or dtype, sinks_dtype=dtype)
    row = (4 + 2 + 2) * 16
    half = [
        Run(0, 1, 8, 0, 1, True, 0, 0, 1, -1, 8, 1, 1, 0, 1),
        Run(8, 1, 8, 8, 1, True, 0, 0, 1, 1, 0, 1, 1, 0, 1),
    ]
    plain = (Run(0, 1, 16, 0, 1),)
    heads = [(4, 0, tuple(half)), (2, 64, tuple(half)), (2, 96, plain)]
    q, k, v = (
        HeadSource(
            (1, -1, row), dtype, HeadsAttrs(count, 16, offset, row, 16, False, runs, of_norm, 16), dtype
        )
        for (count, offset, runs), of_norm in zip(heads, (norm, norm, None), strict=True)
    )
    return RopeConfig(attention, q, k, v, ((1, -1, 8), (1, -1, 8)), "float32")


@pytest.mark.parametrize(
    ("dtype", "norm"),
    [
        ("bfloat16", None),
        ("float32", replace(RMS, plus_one=True)),
        pytest.param("float32", None, marks=pytest.mark.slow),
        pytest.param("bfloat16", LAYER, marks=pytest.mark.slow),
    ],
)
def test_rope_append_and_decode_with_rope(dtype: str, norm: NormAttrs | None) -> None:
    """The rotation against numpy, and decode with the rotation inside against decode behind it."""
    cfg = rope_config(dtype, norm)
    a = cfg.attention
    kernels = TOOLS.build(
        gpu(),
        rope=rope_append(cfg, gpu()),
        decode=attention_decode(a, gpu()),
        both=attention_decode(a, gpu(), cfg),
    )
    t, pages = 3, 8
    x = TOOLS.random(RNG, (1, t, 128), dtype)
    angle = RNG.standard_normal((1, t, 8)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    slot = np.array([16 + 15, 48, 80 + 7], np.int32)
    context = np.array([16, 1, 24], np.int32)
    table = np.array([[1, 0], [3, 0], [4, 5]], np.int32)
    start = np.arange(t + 1, dtype=np.int32)
    old_k = TOOLS.random(RNG, (pages, 2, 2, 16, 16), dtype)
    old_v = TOOLS.random(RNG, (pages, 2, 2, 16, 16), dtype)
    vectors = [TOOLS.random(RNG, (16,), dtype) for _ in range(norm.vectors if norm else 0)]
    outs = []
    for name in ("rope", "both"):
        k_pool, v_pool = TOOLS.tensor(old_k.copy()), TOOLS.tensor(old_v.copy())
        q = TOOLS.tensor(np.zeros((1, t, 4, 16), DTYPES[dtype]))
        out = TOOLS.tensor(np.full((1, t, 4, 16), np.nan, DTYPES[dtype]))
        part = TOOLS.tensor(np.zeros((t, 2, a.splits, 2, 32), np.float32))
        sources = [TOOLS.tensor(s) for s in (x, *vectors, x, *vectors, x, cos, sin, slot)]
        tables = [TOOLS.tensor(s) for s in (start, context, table)]
        if name == "rope":
            kernels["rope"](*sources, k_pool, v_pool, 1, q)
            kernels["decode"](q, k_pool, v_pool, *tables, 1, out, part)
            wide = x.astype(np.float32)[0, :, :64].reshape(t, 4, 16)
            if norm is not None:
                wide = wide - wide.mean(-1, keepdims=True) * norm.center
                wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + norm.eps)
                wide = wide * (vectors[0].astype(np.float32) + norm.plus_one)
                wide = wide + vectors[1].astype(np.float32) if norm.has_bias else wide
            low, high = wide[..., :8], wide[..., 8:]
            c, s = cos[0][:, None], sin[0][:, None]
            expected = np.concatenate([low * c - high * s, high * c + low * s], -1)
            assert np.abs(q.numpy()[0].astype(np.float32) - expected).max() < 3 * TOOLS.exact[dtype]
            np.testing.assert_array_equal(v_pool.numpy()[3, 1, :, 0], x[0, 1, 96:].reshape(2, 16))
            changed = (k_pool.numpy() != old_k).sum()
            assert 0 < changed <= t * 2 * 16
        else:
            kernels["both"](*sources, k_pool, v_pool, *tables, 1, out, part)
        outs.append((out.numpy(), k_pool.numpy(), v_pool.numpy()))
    for one, other in zip(*outs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("largest", [True, False])
def test_top_k(largest: bool) -> None:
    rows, n, k = 3, 70, 8
    x = RNG.integers(-9, 9, (rows, n)).astype(np.float32)  # many equal ones
    x[0, 5], x[1] = -np.inf, 4
    values, indices = (
        TOOLS.tensor(np.zeros((rows, k), np.float32)),
        TOOLS.tensor(np.zeros((rows, k), np.int64)),
    )
    func = top_k(TopKConfig((-1, n), k, largest, "float32", "int64"), gpu())
    TOOLS.build(gpu(), k=func)["k"](TOOLS.tensor(x), values, indices)
    order = np.argsort(-x if largest else x, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(x, order, -1))
