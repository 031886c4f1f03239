"""Products per head against numpy: heads wherever they lie, with and without a rotated rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.ops import HeadLinearAttrs, HeadsAttrs, Run
from llmc.schedules.head_linear import HeadLinearConfig, head_linear
from llmc.schedules.layout import linear_layout

HEADS, K, N, REST = 3, 16, 40, 8
WIDTH = K + REST
RUNS = (
    Run(0, 1, REST // 2, 0, 1, True, 0, 0, 1, -1, REST // 2, 1, 1, 0, 1),
    Run(REST // 2, 1, REST // 2, REST // 2, 1, True, 0, 0, 1, 1, 0, 1, 1, 0, 1),
)
ROTATED = HeadsAttrs(HEADS, REST, K, HEADS * WIDTH, WIDTH, False, RUNS)
BASE = HeadLinearConfig(
    HeadLinearAttrs(HEADS, 0, HEADS * WIDTH, WIDTH, False, ROTATED),
    *(N, K, "float32", (1, -1, HEADS * WIDTH), ((1, -1, REST // 2),) * 2, "float32"),
)
PLAIN = HeadLinearConfig(HeadLinearAttrs(HEADS, 0, K, K, True), N, K, "float32", (1, HEADS, -1, K))
CASES = {
    "rotated": BASE,
    "rotated-bf16": replace(BASE, dtype="bfloat16"),
    "head-major-f16": replace(PLAIN, dtype="float16"),
    "odd-bf16": replace(
        PLAIN, attrs=HeadLinearAttrs(HEADS, 0, HEADS * 15, 15, False), k=15, n=64, dtype="bfloat16",
        shape=(1, -1, HEADS, 15),
    ),
    "wide-bf16": replace(
        PLAIN, attrs=HeadLinearAttrs(HEADS, 0, HEADS * 128, 128, False), k=128, n=72, dtype="bfloat16",
        shape=(1, -1, HEADS, 128),
    ),
}  # fmt: skip
TOKENS = (1, 3, 17, 70)


def error(cfg, caps, tools, kernel, tokens):
    """Largest error against float64, relative to the result's range."""
    rng = np.random.default_rng(tokens)
    attrs = cfg.attrs
    x = tools.random(rng, [tokens if d < 0 else d for d in cfg.shape], cfg.dtype)
    w = tools.random(rng, (attrs.heads, cfg.n, cfg.k), cfg.dtype)
    tables = [tools.random(rng, [tokens if d < 0 else d for d in s], "float32") for s in cfg.tensors]
    packed = np.stack([linear_layout(cfg.dtype, caps).pack(one) for one in w])
    out = tools.tensor(np.full((1, tokens, attrs.heads, cfg.width), np.nan, tools.dtypes[cfg.dtype]))
    kernel(tools.tensor(x), *map(tools.tensor, tables), tools.tensor(packed), out)
    flat, wide = x.reshape(-1).astype(np.float64), w.astype(np.float64)
    expected = np.zeros((tokens, attrs.heads, cfg.width))
    for t in range(tokens):
        for h in range(attrs.heads):
            first = attrs.offset + t * attrs.token_stride
            first += h * attrs.head_stride * (tokens if attrs.head_major else 1)
            expected[t, h, : cfg.n] = wide[h] @ flat[first : first + cfg.k]
            if attrs.rest:
                half = REST // 2
                a, b = flat[first + K : first + K + half], flat[first + K + half : first + WIDTH]
                cos, sin = (table[0, t].astype(np.float64) for table in tables)
                expected[t, h, cfg.n :] = np.concatenate([a * cos - b * sin, b * cos + a * sin])
    return np.abs(out.numpy()[0].astype(np.float64) - expected).max() / np.ptp(expected)


@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case, caps, tools):
    cfg = CASES[case]
    kernel = tools.build(caps, k=head_linear(cfg, caps))["k"]
    for tokens in TOKENS:
        assert error(cfg, caps, tools, kernel, tokens) < tools.exact[cfg.dtype], tokens
