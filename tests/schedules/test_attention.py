from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.attention import (
    AttentionConfig,
    attention_decode,
    attention_prefill,
    kv_append,
    partial_shape,
)
from llmc.schedules.attention_config import LatentConfig
from llmc.schedules.tile_attention import attention_unit
from tests.kv_rounding import empty_pool, rounded

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
BF16 = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
CASES = {
    "f32": {},
    "bf16": BF16,
    "f16-dims": {"dtype": "float16", "kv_dtype": "float16", "key_dim": 24, "value_dim": 16},
    "window": {"window": 20},
    "bf16-window-sinks-dims": {**BF16, "key_dim": 24, "value_dim": 8, "window": 37, "has_sinks": True},
    "chunk-softcap": {"chunk": 16, "softcap": 5.0},
    "alibi-sinks-bf16-pages": {"has_alibi": True, "has_sinks": True, "kv_dtype": "bfloat16", "value_dim": 8},
    "bf16-one-kv-head": {**BF16, "heads": 8, "kv_heads": 1, "key_dim": 80, "value_dim": 80, "page_size": 32},
    "bf16-softcap-mha": {**BF16, "heads": 3, "kv_heads": 3, "key_dim": 7, "value_dim": 32, "softcap": 3.0},
    "int8": {"kv_dtype": "int8", "has_sinks": True, "key_dim": 24, "value_dim": 32},
    "int8-bf16-window-dims": {
        "dtype": "bfloat16",
        "kv_dtype": "int8",
        "key_dim": 24,
        "value_dim": 40,
        "window": 37,
    },
    "int8-bf16-sinks": {
        "dtype": "bfloat16",
        "kv_dtype": "int8",
        "has_sinks": True,
        "key_dim": 24,
        "value_dim": 32,
    },
    "fp8-bf16-one-kv-head": {
        "dtype": "bfloat16",
        "kv_dtype": "float8_e4m3fn",
        "heads": 8,
        "kv_heads": 1,
        "key_dim": 80,
        "value_dim": 80,
        "page_size": 32,
    },
    "fp8-f16-alibi-softcap": {
        "dtype": "float16",
        "kv_dtype": "float8_e4m3fn",
        "has_alibi": True,
        "softcap": 5.0,
    },
    # decode takes several cached heads per task where there are more heads than threads
    "window-many-heads": {"heads": 8, "kv_heads": 8, "window": 100},
    "many-heads-with-tails": {"heads": 8, "kv_heads": 8, "value_dim": 8},
    "bf16-sinks-many-heads": {
        **BF16,
        "heads": 24,
        "kv_heads": 8,
        "value_dim": 48,
        "page_size": 32,
        "has_sinks": True,
    },
    "int8-many-heads": {
        "heads": 8,
        "kv_heads": 8,
        "kv_dtype": "int8",
        "window": 100,
    },
    "wide": {"heads": 3, "kv_heads": 3, "key_dim": 192, "value_dim": 128, "page_size": 48, "scale": 0.1},
}
LATENT = LatentConfig(
    heads=5,
    kv_heads=1,
    key_dim=24,
    value_dim=16,
    dtype="float32",
    kv_dtype="float32",
    page_size=16,
    layers=2,
    scale=0.25,
)
LATENTS = {
    "f32": {},
    "bf16": {**BF16, "heads": 16, "key_dim": 96, "value_dim": 64, "page_size": 32},
    "bf16-window-sinks-odd": {**BF16, "key_dim": 27, "value_dim": 21, "window": 37, "has_sinks": True},
    "bf16-pages-alibi": {"kv_dtype": "bfloat16", "heads": 40, "has_alibi": True},
    "f16-softcap-no-rotation": {"dtype": "float16", "kv_dtype": "float16", "value_dim": 24, "softcap": 5.0},
    "lite": {**BF16, "heads": 16, "key_dim": 576, "value_dim": 512, "page_size": 32, "scale": 0.04},
}
# (new tokens, context) per sequence
PREFILLS = ([(5, 5), (1, 33), (40, 70), (17, 17)], [(1, 1)], [(150, 150)], [(3, 300)])
DECODES = ([(1, 1), (1, 600), (1, 33), (1, 2), (1, 130)], [(1, 1500)])


def reference(cfg, q, k, v, sinks, alibi):
    """float64 attention of one sequence: q [h,n,dk], k [hk,L,dk], v [hk,L,dv] -> [n,h,dv]."""
    heads, n, _ = q.shape
    length = k.shape[1]
    group = heads // k.shape[0]
    i, j = np.arange(length - n, length)[:, None], np.arange(length)[None]
    allowed = j <= i
    if cfg.window:
        allowed &= i - j < cfg.window
    if cfg.chunk:
        allowed &= i // cfg.chunk == j // cfg.chunk
    out = np.zeros((n, heads, v.shape[2]))
    for head in range(heads):
        score = q[head] @ k[head // group].T * cfg.scale
        if cfg.softcap:
            score = cfg.softcap * np.tanh(score / cfg.softcap)
        if alibi is not None:
            score = score + alibi[head] * (j - i)
        weight = np.exp(np.where(allowed, score, -np.inf))
        total = weight.sum(1, keepdims=True) + (np.exp(sinks[head]) if sinks is not None else 0)
        out[:, head] = weight / total @ v[head // group]
    return out


class Cache:
    """Pools full of NaN, so that reading anything but written entries shows; pages in random order."""

    def __init__(self, cfg, tools, batch, rng):
        self.cfg, self.tools, self.batch = cfg, tools, batch
        ps = cfg.page_size
        width = max(-(-context // ps) for _, context in batch) + 1
        pages = 1 + len(batch) * width
        free = iter(rng.permutation(np.arange(1, pages)))
        self.table = np.zeros((len(batch), width), np.int32)
        for b, (_, context) in enumerate(batch):
            for j in range(-(-context // ps)):
                self.table[b, j] = next(free)
        lead = (pages, cfg.layers, cfg.kv_heads)
        self.k_pool = tools.tensor(empty_pool((*lead, *cfg.k_page), cfg.kv_dtype))
        self.v_pool = tools.tensor(empty_pool((*lead, *cfg.v_page), cfg.kv_dtype))
        self.keys = [tools.random(rng, (cfg.kv_heads, c, cfg.key_dim), cfg.dtype) for _, c in batch]
        if cfg.latent:
            self.values = [keys[..., : cfg.value_dim] for keys in self.keys]
        else:
            self.values = [tools.random(rng, (cfg.kv_heads, c, cfg.value_dim), cfg.dtype) for _, c in batch]

    @property
    def pools(self):
        return [self.k_pool] if self.cfg.latent else [self.k_pool, self.v_pool]

    def slots(self):
        ps = self.cfg.page_size
        return np.concatenate(
            [
                self.table[b, np.arange(c) // ps] * ps + np.arange(c) % ps
                for b, (_, c) in enumerate(self.batch)
            ]
        ).astype(np.int32)

    def append(self, kernel, layer):
        t = self.tools.tensor
        parts = (self.keys, self.values)[: len(self.pools)]
        new = [t(np.concatenate(part, 1)[None]) for part in parts]
        kernel(*new, t(self.slots()), *self.pools, layer)

    def free_behind_window(self):
        for b, (new, context) in enumerate(self.batch):
            first = max(0, context - new - self.cfg.window + 1)
            self.table[b, : first // self.cfg.page_size] = 0


def run(cfg, tools, kernels, batch, decode):
    rng = np.random.default_rng(len(batch))
    layer = cfg.layers - 1
    cache = Cache(cfg, tools, batch, rng)
    cache.append(kernels["append"], layer)
    if cfg.window:
        cache.free_behind_window()
    start = np.cumsum([0, *(new for new, _ in batch)]).astype(np.int32)
    q = tools.random(rng, (1, cfg.heads, start[-1], cfg.key_dim), cfg.dtype)
    sinks = tools.random(rng, (cfg.heads,), cfg.dtype) if cfg.has_sinks else None
    alibi = np.abs(tools.random(rng, (cfg.heads,), "float32")) if cfg.has_alibi else None
    out = tools.tensor(np.full((1, start[-1], cfg.heads, cfg.value_dim), np.nan, tools.dtypes[cfg.dtype]))
    t = tools.tensor
    context = np.array([c for _, c in batch], np.int32)
    args = [t(q), *cache.pools, t(start), t(context), t(cache.table)]
    args += [t(x) for x in (sinks, alibi) if x is not None]
    args += [layer, out]
    if decode:
        args.append(t(np.full((len(batch), *partial_shape(cfg)), np.nan, np.float32)))
    kernels["decode" if decode else "prefill"](*args)
    worst = 0.0
    for b in range(len(batch)):
        expected = reference(
            cfg,
            q[0, :, start[b] : start[b + 1]].astype(np.float64),
            rounded(cache.keys[b], cfg.kv_dtype),
            rounded(cache.values[b], cfg.kv_dtype),
            None if sinks is None else sinks.astype(np.float64),
            alibi,
        )
        error = np.abs(out.numpy()[0, start[b] : start[b + 1]].astype(np.float64) - expected).max()
        worst = float(np.maximum(worst, error))  # a NaN stays one
    return worst


@pytest.mark.parametrize("case", CASES)
def test_attention_matches_numpy(case, best, tools):
    check(case, best, tools)


@pytest.mark.parametrize("case", ["f32", "bf16-window-sinks-dims"])
def test_attention_without_bf16_dot(case, caps, best, tools):
    if caps == best:
        pytest.skip("covered by test_attention_matches_numpy")
    check(case, caps, tools)


@pytest.mark.parametrize(
    "case", [*list(LATENTS)[:-1], pytest.param("lite", marks=pytest.mark.slow(reason="long sums in numpy"))]
)
def test_latents_match_numpy(case, caps, tools):
    check_config(replace(LATENT, **LATENTS[case], sinks_dtype=""), caps, tools)


UNIT_CASES = {
    "window-sinks-dims": {**BF16, "key_dim": 64, "value_dim": 24, "window": 37, "has_sinks": True},
    "one-kv-head": {**BF16, "heads": 8, "kv_heads": 1, "key_dim": 96, "value_dim": 80, "page_size": 32},
}


@pytest.mark.parametrize(
    "case", [next(iter(UNIT_CASES)), pytest.param("one-kv-head", marks=pytest.mark.slow)]
)
def test_prefill_on_tile_registers(case, emulated, tools):
    if not emulated.has_bf16_dot:
        pytest.skip("the kernel makes bf16 pairs with instructions that this machine lacks")
    cfg = replace(BASE, **UNIT_CASES[case], sinks_dtype="")
    assert attention_unit(cfg, emulated) is not None
    kernels = tools.build(emulated, append=kv_append(cfg, emulated), prefill=attention_prefill(cfg, emulated))
    for batch in PREFILLS:
        assert run(cfg, tools, kernels, batch, decode=False) < tools.exact[cfg.dtype] * 2, batch


def check(case, caps, tools):
    check_config(replace(BASE, **CASES[case], sinks_dtype=""), caps, tools)


def check_config(cfg, caps, tools):
    kernels = tools.build(
        caps,
        append=kv_append(cfg, caps),
        prefill=attention_prefill(cfg, caps),
        decode=attention_decode(cfg, caps),
    )
    for batch in PREFILLS:
        assert run(cfg, tools, kernels, batch, decode=False) < tools.exact[cfg.dtype] * 2, batch
    for batch in DECODES:
        assert run(cfg, tools, kernels, batch, decode=True) < tools.exact[cfg.dtype], batch


def test_append_touches_only_its_slots(best, tools):
    cfg = replace(BASE, dtype="float32", kv_dtype="float16", value_dim=20)
    kernel = tools.build(best, append=kv_append(cfg, best))["append"]
    rng = np.random.default_rng(0)
    cache = Cache(cfg, tools, [(5, 5), (20, 20)], rng)
    cache.append(kernel, 1)
    k, v, slots = cache.k_pool.numpy(), cache.v_pool.numpy(), cache.slots()
    keys, values = (np.concatenate(x, 1).astype(np.float16) for x in (cache.keys, cache.values))
    for token, slot in enumerate(slots):
        page, offset = divmod(slot, cfg.page_size)
        assert (k[page, 1, :, :, offset] == keys[:, token]).all()
        assert (v[page, 1, :, offset] == values[:, token]).all()
    assert np.isfinite(k).sum() == keys.size and np.isfinite(v).sum() == values.size


def test_config_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="multiple"):
        replace(BASE, heads=5)
    with pytest.raises(ValueError, match="page_size 24"):
        replace(BASE, page_size=24)
    assert AttentionConfig.from_json(BASE.to_json()) == BASE
