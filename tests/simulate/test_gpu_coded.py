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
from tests.kv_rounding import scales_and_codes
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
    check_pages(cfg, cache)


def check_pages(cfg: AttentionConfig, cache: Cache) -> None:
    """The bytes of every slot that was written; all others as they were."""
    pools = (cache.k_pool.numpy(), cache.v_pool.numpy())
    rows = [np.concatenate(x, 1) for x in (cache.keys, cache.values)]
    touched = 0
    for pool, x, key in zip(pools, rows, (True, False), strict=True):
        scales, codes = scales_and_codes(x, cfg.kv_dtype)
        stored = codes.view(np.uint8) ^ (0x80 if cfg.kv_dtype == "int8" else 0)
        dim, ps = x.shape[2], cfg.page_size
        words = -(-dim // 4)
        for token, slot in enumerate(cache.slots()):
            page, offset = divmod(int(slot), ps)
            part = pool[page, 1]
            d = np.arange(dim)
            places = (d // 4 * ps + offset) * 4 + d % 4
            if not key:
                places = (offset // 4 * (words * 4) + d) * 4 + offset % 4
            assert (part[:, places] == stored[:, token]).all()
            at = ps * words * 4 + 2 * offset
            found = np.ascontiguousarray(part[:, at : at + 2]).view(np.uint16)[:, 0]
            assert (found == scales.view(np.uint16)[:, token]).all()
            part[:, places], part[:, at : at + 2] = 0xFF, 0xFF
            touched += 1
        if key:  # what fills the last word of a key up is a code of zero
            pool[pool == (0x80 if cfg.kv_dtype == "int8" else 0)] = 0xFF
        elif dim % 4 == 0:
            assert (pool == 0xFF).all()
    assert touched == 2 * rows[0].shape[1]
