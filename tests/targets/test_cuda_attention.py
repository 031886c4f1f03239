"""Attention on the matrix units as the assembler sees it: every architecture and head, no spills, shared memory that fits."""

from __future__ import annotations

import pytest

from llmc.ops import HeadsAttrs, Run
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.gpu import flash, flash_decode, flash_group
from llmc.schedules.gpu.attention import attention_decode, attention_prefill
from llmc.schedules.kernels import with_defaults
from llmc.schedules.rope import HeadSource, RopeConfig
from llmc.targets.cuda.backend import BACKEND, capabilities, tvm_target
from llmc.targets.cuda.build import build_kernels
from tests.targets.test_cuda import needs_compiler

HEADS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
PRESETS = [p for p in BACKEND.presets if p != "sm_75"]
EACH = [
    pytest.param(preset, dims, marks=[] if (preset, dims[0]) == ("sm_90", 128) else [pytest.mark.slow])
    for preset in PRESETS
    for dims in HEADS
]


def rotated(cfg: AttentionConfig) -> RopeConfig:
    """q, k and v in one row of a projection, q and k rotated in halves."""
    d, half = cfg.key_dim, cfg.key_dim // 2
    row = (cfg.heads + 2 * cfg.kv_heads) * d
    runs = (
        Run(0, 1, half, 0, 1, True, 0, 0, 1, -1, half, 1, 1, 0, 1),
        Run(half, 1, half, half, 1, True, 0, 0, 1, 1, 0, 1, 1, 0, 1),
    )
    q, k, v = (
        HeadSource((1, -1, row), cfg.dtype, HeadsAttrs(count, d, first * d, row, d, False, of, None, d))
        for count, first, of in (
            (cfg.heads, 0, runs),
            (cfg.kv_heads, cfg.heads, runs),
            (cfg.kv_heads, cfg.heads + cfg.kv_heads, (Run(0, 1, d, 0, 1),)),
        )
    )
    return RopeConfig(cfg, q, k, v, ((1, -1, half), (1, -1, half)), "float32")


@needs_compiler
@pytest.mark.parametrize(
    ("preset", "dims"), EACH, ids=lambda v: str(v) if isinstance(v, str) else f"{v[0]}x{v[1]}"
)
def test_attention_assembles_without_spills(preset: str, dims: tuple[int, int]) -> None:
    caps = capabilities(preset)
    cfg = AttentionConfig(32, 8, *dims, "bfloat16", "bfloat16", 32, 32, 0.1, token_major=True)
    cfg = with_defaults(cfg, caps)
    cut, piece = flash_group.shape(cfg, caps) or flash.shape(cfg, caps), flash_decode.shape(cfg, caps)
    assert cut is not None and piece is not None
    funcs = {"prefill": attention_prefill(cfg, caps), "decode": attention_decode(cfg, caps)}
    if dims[0] == dims[1]:
        funcs["rotating"] = attention_decode(cfg, caps, rotated(cfg))
    _, _, kernels = build_kernels(funcs, tvm_target(caps), (preset,))
    assert not [k for k in kernels if k.spill_bytes or k.stack_bytes]
    sizes = {k.name: k.shared_bytes for k in kernels}
    assert sizes["prefill_kernel"] == cut.shared_bytes(cfg) <= caps.shared_bytes
    assert piece.shared_bytes(cfg) <= sizes["decode_kernel"] <= caps.shared_bytes


_QUICK = ("sm_90", 64, "int8")
CODED = [
    pytest.param(
        preset, dims, kv_dtype, marks=[] if (preset, dims[0], kv_dtype) == _QUICK else [pytest.mark.slow]
    )
    for preset in PRESETS
    for dims in HEADS
    for kv_dtype in ("int8", "float8_e4m3fn")
]


@needs_compiler
@pytest.mark.parametrize(("preset", "dims", "kv_dtype"), CODED)
def test_attention_over_codes_assembles_without_spills(
    preset: str, dims: tuple[int, int], kv_dtype: str
) -> None:
    caps = capabilities(preset)
    cfg = AttentionConfig(32, 8, *dims, "bfloat16", kv_dtype, 32, 32, 0.1, token_major=True)
    cfg = with_defaults(cfg, caps)
    cut, piece = flash.shape(cfg, caps), flash_decode.shape(cfg, caps)
    assert cut is not None and piece is not None and flash_group.shape(cfg, caps) is None
    same = dims[0] == dims[1]
    funcs = {
        "prefill": attention_prefill(cfg, caps),
        "decode": attention_decode(cfg, caps, rotated(cfg) if same else None),
    }
    _, _, kernels = build_kernels(funcs, tvm_target(caps), (preset,))
    assert not [k for k in kernels if k.spill_bytes or k.stack_bytes]
    assert all(k.shared_bytes <= caps.shared_bytes for k in kernels)
