"""Attention over pages of 8-bit codes on machines with threads: numbers and races in the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.attention import partial_shape
from llmc.schedules.attention_config import AttentionConfig, LatentConfig
from llmc.schedules.gpu import flash, flash_decode, flash_group
from llmc.schedules.gpu.attention import attention_decode, attention_prefill
from llmc.schedules.gpu.rope import kv_append, rope_append
from tests.kv_rounding import check_pages
from tests.schedules.test_attention import BASE, Cache, run
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu
from tests.simulate.test_gpu_kernels import rope_config

TOOLS = SimulatedTools()
INT8, FP8 = {"kv_dtype": "int8"}, {"kv_dtype": "float8_e4m3fn"}
PLAIN: dict[str, dict[str, Any]] = {
    "int8-odd-dims-window-sinks": {**INT8, "key_dim": 7, "value_dim": 18, "window": 20, "has_sinks": True},
    "fp8-softcap": {**FP8, "softcap": 5.0, "page_size": 32},
}


def config(**changes: Any) -> AttentionConfig:
    return replace(BASE, **changes, sinks_dtype="")


def check(cfg: AttentionConfig, prefills: Any, decodes: Any, tolerance: float) -> None:
    kernels = TOOLS.build(
        gpu(),
        append=kv_append(cfg, gpu()),
        prefill=attention_prefill(cfg, gpu()),
        decode=attention_decode(cfg, gpu()),
    )
    for batch in prefills:
        assert run(cfg, TOOLS, kernels, batch, decode=False) < tolerance * 2, batch
    for batch in decodes:
        assert run(cfg, TOOLS, kernels, batch, decode=True) < tolerance, batch


@pytest.mark.parametrize("case", PLAIN)
def test_plain_kernels(case: str) -> None:
    cfg = config(**PLAIN[case])
    assert flash.shape(cfg, gpu()) is None and flash_decode.shape(cfg, gpu()) is None
    check(cfg, [[(5, 5), (1, 33), (20, 40)]], [[(1, 1), (1, 300), (1, 33)]], TOOLS.exact["float32"])


UNITS: dict[str, dict[str, Any]] = {
    "int8-bf16-sinks": {**INT8, "dtype": "bfloat16", "has_sinks": True, "page_size": 32, "heads": 6},
    "fp8-f16-window-softcap": {
        **{
            **FP8,
            "dtype": "float16",
            "key_dim": 32,
            "value_dim": 48,
            "heads": 8,
            "window": 20,
            "softcap": 5.0,
        }
    },
    "int8-f16-alibi": {**INT8, "dtype": "float16", "has_alibi": True},
    "fp8-bf16-80-chunk": {
        **{**FP8, "dtype": "bfloat16", "key_dim": 80, "value_dim": 80, "page_size": 64, "chunk": 24}
    },
}


@pytest.mark.parametrize("case", UNITS)
def test_matrix_units(case: str) -> None:
    cfg = config(**UNITS[case])
    assert (
        flash.shape(cfg, gpu()) and flash_decode.shape(cfg, gpu()) and flash_group.shape(cfg, gpu()) is None
    )
    # weights are rounded to bfloat16 in all types
    check(cfg, [[(5, 5), (1, 33), (70, 90)]], [[(1, 1), (1, 300), (1, 33)]], TOOLS.exact["bfloat16"])


@pytest.mark.parametrize("changes", [INT8, FP8], ids=["int8", "fp8"])
def test_appended_codes_are_exact(changes: dict[str, Any]) -> None:
    cfg = config(**changes, key_dim=18, value_dim=20)
    kernel = TOOLS.build(gpu(), append=kv_append(cfg, gpu()))["append"]
    cache = Cache(cfg, TOOLS, [(5, 5), (20, 20)], np.random.default_rng(0))
    cache.append(kernel, 1)
    check_pages(cfg.kv_dtype, cfg.page_size, cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotation_appends_what_the_append_would(dtype: str) -> None:
    """Pages of the rotating kernel, and of decode with the rotation inside, which must attend to them as decode does."""
    cfg = rope_config(dtype, kv_dtype="int8")
    a, numbers = cfg.attention, rope_config(dtype)
    kernels = TOOLS.build(
        gpu(),
        numbers=rope_append(numbers, gpu()),
        append=kv_append(replace(a, token_major=False), gpu()),
        rope=rope_append(cfg, gpu()),
        decode=attention_decode(a, gpu()),
        both=attention_decode(a, gpu(), cfg),
    )
    rng, t, tensor = np.random.default_rng(5), 3, TOOLS.tensor
    x = TOOLS.random(rng, (1, t, 128), dtype)
    angle = rng.standard_normal((1, t, 8)).astype(np.float32)
    slot = np.array([16 + 15, 48, 80 + 7], np.int32)
    tables = [
        tensor(np.arange(t + 1, dtype=np.int32)),
        tensor(np.array([16, 1, 24], np.int32)),
        tensor(np.array([[1, 0], [3, 0], [4, 5]], np.int32)),
    ]
    sources = [tensor(s) for s in (x, x, x, np.cos(angle), np.sin(angle), slot)]
    q = tensor(np.zeros((1, t, 4, 16), DTYPES[dtype]))
    plain = [tensor(np.zeros((8, 2, 2, 16, 16), DTYPES[dtype])) for _ in range(2)]
    kernels["numbers"](*sources, *plain, 1, q)
    places = (slot // 16, slot % 16)
    k = plain[0].numpy()[places[0], 1, :, :, places[1]].swapaxes(0, 1)[None]
    v = plain[1].numpy()[places[0], 1, :, places[1]].swapaxes(0, 1)[None]
    old = [rng.integers(1, 255, (8, 2, 2, 16 * 18)).astype(np.uint8) for _ in range(2)]
    for pool in old:  # scales that are numbers
        pool[..., 256:].view(np.uint16)[...] = 0x3C00 + rng.integers(0, 99, pool[..., 256::2].shape)
    pools = [[tensor(p.copy()) for p in old] for _ in range(3)]
    kernels["append"](tensor(k), tensor(v), tensor(slot), *pools[0], 1)
    kernels["rope"](*sources, *pools[1], 1, q)
    outs = [tensor(np.full((1, t, 4, 16), np.nan, DTYPES[dtype])) for _ in range(2)]
    part = tensor(np.zeros((t, *partial_shape(a)), np.float32))
    kernels["decode"](q, *pools[1], *tables, 1, outs[0], part)
    kernels["both"](*sources, *pools[2], *tables, 1, outs[1], part)
    for side in range(2):
        assert (pools[0][side].numpy() != old[side]).any()
        for other in pools[1:]:
            np.testing.assert_array_equal(pools[0][side].numpy(), other[side].numpy())
    np.testing.assert_array_equal(outs[0].numpy(), outs[1].numpy())
    assert np.isfinite(outs[0].numpy().astype(np.float32)).all()


def test_latents_have_no_codes() -> None:
    with pytest.raises(ValueError, match="no pages of int8"):
        LatentConfig(4, 1, 32, 16, "bfloat16", "int8", 16, 1, 0.1)
