"""Codes and scales of cache pages on the CPU: exact bytes, rows of zeros, numbers that are not finite."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llmc.cache_rounding import round_cache
from llmc.schedules.attention import attention_decode, attention_prefill, kv_append, partial_shape
from llmc.schedules.attention_bytes import takes_bytes
from llmc.schedules.kv_arrays import coded_part, decoded
from tests.kv_rounding import RANGE, check_pages, rounded, scales_and_codes
from tests.schedules.test_attention import BASE, Cache

KINDS = pytest.mark.parametrize("kv_dtype", list(RANGE))


@KINDS
def test_append_stores_what_numpy_rounds_to(kv_dtype, best, tools):
    cfg = replace(BASE, kv_dtype=kv_dtype, key_dim=18, value_dim=20)
    cache = Cache(cfg, tools, [(5, 5), (20, 20)], np.random.default_rng(0))
    # sizes from the smallest scale to numbers that a scale of float16 would not hold, and ties
    cache.keys[1] *= np.float32(10.0) ** np.linspace(-30, 30, 20, dtype=np.float32)[:, None]
    cache.values[0][:] = np.round(cache.values[0] * 2) / 2
    cache.append(tools.build(best, append=kv_append(cfg, best))["append"], 1)

    class Read:
        k_pool, v_pool = (tools.tensor(p.numpy().copy()) for p in (cache.k_pool, cache.v_pool))
        keys, values, slots = cache.keys, cache.values, cache.slots

    pools = [p.numpy().copy() for p in (cache.k_pool, cache.v_pool)]
    Read.k_pool, Read.v_pool = (type("P", (), {"numpy": lambda self, p=p: p})() for p in pools)
    check_pages(kv_dtype, cfg.page_size, Read)


@KINDS
def test_what_is_not_finite_shows_and_rows_of_zeros_are_zero(kv_dtype, best, tools):
    cfg = replace(BASE, kv_dtype=kv_dtype, dtype="bfloat16", sinks_dtype="")
    assert takes_bytes(cfg, best) == (kv_dtype == "int8") or best.byte_dot.value == "none"
    kernels = tools.build(
        best,
        append=kv_append(cfg, best),
        prefill=attention_prefill(cfg, best),
        decode=attention_decode(cfg, best),
    )
    t, n = tools.tensor, 40

    def results(change):
        """(prefill of the last two tokens, decode of the last) after a change of keys and values."""
        cache = Cache(cfg, tools, [(2, n)], np.random.default_rng(1))
        change(cache.keys[0], cache.values[0])
        cache.append(kernels["append"], 0)
        q = tools.random(np.random.default_rng(2), (1, cfg.heads, 2, 16), cfg.dtype)
        found = []
        for name, new in (("prefill", 2), ("decode", 1)):
            out = t(np.full((1, new, cfg.heads, 16), np.nan, tools.dtypes[cfg.dtype]))
            args = [t(np.ascontiguousarray(q[:, :, 2 - new :])), cache.k_pool, cache.v_pool]
            args += [t(np.array([0, new], np.int32)), t(np.array([n], np.int32)), t(cache.table), 0, out]
            args += [t(np.zeros((1, *partial_shape(cfg)), np.float32))] * (name == "decode")
            kernels[name](*args)
            found.append(out.numpy().astype(np.float32)[0])
        return found

    def zero(keys, values):
        keys[:], values[:] = 0, 0

    for found in results(zero):
        assert (found == 0).all()
    for bad in (np.nan, np.inf):

        def spoil(keys, values, bad=bad):
            keys[0, 7, 3] = bad  # of the first cached head, which query heads 0 and 1 read
            values[1, 9, 5] = bad

        for found in results(spoil):
            assert not np.isfinite(found).all(-1).any()


@KINDS
def test_the_reference_and_the_tuner_round_alike(kv_dtype):
    import torch

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 32, 20)) * 10.0 ** rng.uniform(-3, 3, (3, 32, 1))).astype(np.float32)
    x[1, 4] = 0
    expected = rounded(x, kv_dtype).astype(np.float32)
    np.testing.assert_array_equal(round_cache(torch.from_numpy(x), kv_dtype).numpy(), expected)
    np.testing.assert_array_equal(decoded(x, kv_dtype), expected)
    np.testing.assert_array_equal(decoded(expected, kv_dtype), expected)
    scales, _ = scales_and_codes(x, kv_dtype)
    part = coded_part(x, kv_dtype, keys=True)
    assert part.shape == (3, 32 * 22)
    stored = np.ascontiguousarray(part[:, 32 * 20 :]).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored, scales)
