"""Attention on the matrix units: numbers and races in the simulator, what a block takes, and every barrier's need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.schedules.attention import partial_shape
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import flash, flash_decode, matrix_unit
from llmc.schedules.gpu.attention import attention_decode, attention_prefill
from llmc.schedules.gpu.rope import kv_append, rope_append
from llmc.simulate import SimulationError
from tests.schedules.test_attention import BASE, Cache, run
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu
from tests.simulate.test_gpu_kernels import rope_config

TOOLS = SimulatedTools()
BF16 = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
F16 = {"dtype": "float16", "kv_dtype": "float16"}
ONE_PIECE = ByRows((DecodeSchedule(splits=1),))
CASES: dict[str, dict[str, Any]] = {
    "bf16-sinks": {**BF16, "has_sinks": True, "page_size": 32, "heads": 6},
    "f16-window-sinks-softcap": {
        **{**F16, "key_dim": 32, "value_dim": 48, "heads": 8},
        **{"window": 20, "has_sinks": True, "softcap": 5.0},
    },
    "bf16-alibi-chunk": {**BF16, "page_size": 32, "has_alibi": True, "chunk": 24},
    "bf16-80-long-pages": {**BF16, "key_dim": 80, "value_dim": 80, "page_size": 64},
    "bf16-96-odd-pages": {**BF16, "key_dim": 96, "value_dim": 96, "page_size": 48},
    "f16-192x128": {**F16, "key_dim": 192, "value_dim": 128, "page_size": 32, "scale": 0.1},
    "bf16-256-window": {**BF16, "key_dim": 256, "value_dim": 256, "page_size": 32, "window": 100},
}
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def config(**changes: Any) -> AttentionConfig:
    return replace(BASE, **changes, sinks_dtype="")


# of keys: none to spare, parts of pages, more than the ring holds, more than one tile of rows
FEW = ([(5, 5), (1, 33), (70, 90)],), ([(1, 1), (1, 300), (1, 33)],), [(1, 450)]
MANY = (
    ([(5, 5), (1, 33), (140, 170)], [(3, 300)]),
    ([(1, 1), (1, 600), (1, 33), (1, 130)], [(1, 1500)]),
    [(1, 700), (1, 16)],
)
EACH_CASE = [
    pytest.param(name, FEW if i == 0 else MANY, id=name, marks=[] if i == 0 else [pytest.mark.slow])
    for i, name in enumerate(CASES)
]


@pytest.mark.parametrize(("case", "batches"), EACH_CASE)
def test_against_numpy(case: str, batches: Any) -> None:
    cfg = config(**CASES[case])
    assert flash.shape(cfg, gpu()) and flash_decode.shape(cfg, gpu())
    whole = replace(cfg, decode=ONE_PIECE)
    kernels = TOOLS.build(
        gpu(),
        append=kv_append(cfg, gpu()),
        prefill=attention_prefill(cfg, gpu()),
        decode=attention_decode(cfg, gpu()),
        one=attention_decode(whole, gpu()),
    )
    prefills, decodes, one = batches
    for batch in prefills:
        assert run(cfg, TOOLS, kernels, batch, decode=False) < TOOLS.exact[cfg.dtype] * 2, batch
    for batch in decodes:
        assert run(cfg, TOOLS, kernels, batch, decode=True) < TOOLS.exact[cfg.dtype], batch
    kernels["decode"] = kernels["one"]
    assert run(whole, TOOLS, kernels, one, decode=True) < TOOLS.exact[cfg.dtype]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("preset", ["sm_80", "sm_86", "sm_90"])
def test_there_is_a_cut_for_every_head_and_architecture(dims: tuple[int, int], preset: str) -> None:
    cfg, caps = config(**BF16, key_dim=dims[0], value_dim=dims[1]), gpu(preset)
    cut, piece = flash.shape(cfg, caps), flash_decode.shape(cfg, caps)
    assert cut is not None and piece is not None
    assert max(cut.shared_bytes(cfg), piece.shared_bytes(cfg)) < caps.shared_bytes


def test_what_the_kernels_are_not_made_for() -> None:
    for caps, changes in (
        (gpu("sm_75"), BF16),
        (gpu(), {}),
        (gpu(), {**BF16, "kv_dtype": "float16"}),
        (gpu(), {**BF16, "key_dim": 24}),
    ):
        cfg = config(**changes)
        assert flash.shape(cfg, caps) is None and flash_decode.shape(cfg, caps) is None


@pytest.mark.parametrize("dims", DIMS)
def test_decode_keeps_enough_bytes_on_their_way(dims: tuple[int, int]) -> None:
    """4.3 TB/s for 700 ns are 3 MB; 132 multiprocessors have to wait for 23 KB each at any time."""
    cfg = config(**BF16, key_dim=dims[0], value_dim=dims[1], page_size=32)
    piece = flash_decode.shape(cfg, gpu())
    assert piece is not None
    assert piece.bytes_in_flight(cfg, gpu()) >= 4.3e12 * 700e-9 / 132


# -- barriers ------------------------------------------------------------------------------------------------------------


def _prefill(**changes: Any) -> Any:
    return _attend(300, attention_prefill, **{**BF16, **changes})


def _decode(**changes: Any) -> Any:
    return _attend(900, attention_decode, **{**BF16, **changes})


def _attend(context: int, build: Callable[..., Any], **changes: Any) -> Any:
    cfg = config(**changes)
    cache = Cache(cfg, TOOLS, [(1, context)], np.random.default_rng(0))
    for pool in (cache.k_pool, cache.v_pool):
        pool.array[...] = 1
    kernel = TOOLS.build(gpu(), k=build(cfg, gpu()))["k"]
    q = TOOLS.tensor(np.ones((1, cfg.heads, 1, cfg.key_dim), DTYPES[cfg.dtype]))
    out = TOOLS.tensor(np.ones((1, 1, cfg.heads, cfg.value_dim), DTYPES[cfg.dtype]))
    tables = (np.array([0, 1], np.int32), np.array([context], np.int32), cache.table)
    part = [np.zeros((1, *partial_shape(cfg)), np.float32)] if build is attention_decode else []
    kernel(q, cache.k_pool, cache.v_pool, *map(TOOLS.tensor, tables), 0, out, *map(TOOLS.tensor, part))
    return out.numpy().astype(np.float32)


def _decode_with_rope(fused: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(result, keys, values) of one token behind 600: rotated and appended in the kernel, or before it."""
    rope = rope_config("bfloat16")
    rng, cfg, slot = np.random.default_rng(3), rope.attention, 600
    table = 1 + np.arange(39, dtype=np.int32)[None]
    tables = (np.array([0, 1], np.int32), np.array([slot + 1], np.int32), table)
    pools = [TOOLS.random(rng, (40, 2, 2, 16, 16), "bfloat16") for _ in range(2)]
    pools = [TOOLS.tensor(p) for p in pools]
    x = TOOLS.random(rng, (1, 1, 128), "bfloat16")
    angle = rng.standard_normal((1, 1, 8)).astype(np.float32)
    given = (x, x, x, np.cos(angle), np.sin(angle), np.array([slot + 16], np.int32))
    sources = [TOOLS.tensor(a) for a in given]
    out = TOOLS.tensor(np.full((1, 1, cfg.heads, 16), np.nan, DTYPES["bfloat16"]))
    part = TOOLS.tensor(np.zeros((1, *partial_shape(cfg)), np.float32))
    behind = (*map(TOOLS.tensor, tables), 1, out, part)
    if fused:
        kernel = TOOLS.build(gpu(), k=attention_decode(cfg, gpu(), rope))["k"]
        kernel(*sources, *pools, *behind)
    else:
        q = TOOLS.tensor(np.zeros((1, 1, cfg.heads, 16), DTYPES["bfloat16"]))
        kernels = TOOLS.build(gpu(), rope=rope_append(rope, gpu()), k=attention_decode(cfg, gpu()))
        kernels["rope"](*sources, *pools, 1, q)
        kernels["k"](q, *pools, *behind)
    return out.numpy(), pools[0].numpy(), pools[1].numpy()


def test_the_last_piece_appends() -> None:
    """Of several pieces one writes the key and the value that it reads; the others' race with nobody."""
    for one, other in zip(_decode_with_rope(), _decode_with_rope(fused=False), strict=True):
        assert np.isfinite(one.astype(np.float32)).all()
        np.testing.assert_array_equal(one, other)


# what runs, whose barriers, and how many there are; those of the pieces' merge come after those of the pieces
BARRIERS: dict[str, tuple[Callable[[], Any], str, int]] = {
    "prefill": (_prefill, "barrier", 1),
    "prefill-wide": (lambda: _prefill(key_dim=64, value_dim=144), "barrier", 2),
    "decode": (_decode, "barrier", 5),
    "decode-rope": (_decode_with_rope, "barrier", 6),
    "decode-warps": (lambda: _decode(decode=ONE_PIECE), "warp_barrier", 2),
}
FIRST = {"decode-rope": 0}  # the barrier that only this case has
EACH = [
    pytest.param(case, i, marks=[] if i == FIRST.get(case, count - 1) else [pytest.mark.slow])
    for case, (_, _, count) in BARRIERS.items()
    for i in range(count)
]


@pytest.mark.parametrize(("case", "number"), EACH)
def test_without_a_barrier_there_is_a_race(case: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, name, count = BARRIERS[case]
    seen: list[int] = []
    original = getattr(g, name)

    def barrier() -> None:
        if len(seen) != number:
            original()
        seen.append(0)

    monkeypatch.setattr(g, name, barrier)
    with pytest.raises(SimulationError, match="simulate-race"):
        attend()
    assert len(seen) == count


@pytest.mark.parametrize("attend", [_prefill, _decode])
def test_a_copy_that_is_not_waited_for_shows(
    attend: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a race with whoever reads it, or as the NaN that it is until then."""
    assert np.isfinite(attend()).all()
    original = matrix_unit.wait
    monkeypatch.setattr(matrix_unit, "wait", lambda groups: original(groups + 1))
    try:
        assert not np.isfinite(attend()).all()
    except SimulationError as error:
        assert "simulate-race" in str(error)
