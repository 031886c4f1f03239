"""Latent attention on the matrix units: numbers and races in the simulator, registers, and every barrier's need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.attention import partial_shape
from llmc.schedules.attention_config import DecodeSchedule, LatentConfig
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import flash_latent
from llmc.schedules.gpu.attention import attention_decode, attention_prefill
from llmc.schedules.gpu.rope import kv_append
from llmc.schedules.kernels import with_defaults
from llmc.simulate import SimulationError
from llmc.targets.cuda.backend import BACKEND, capabilities, tvm_target
from llmc.targets.cuda.build import build_kernels
from tests.schedules.test_attention import reference
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu
from tests.targets.test_cuda import needs_compiler

TOOLS = SimulatedTools()
SMALL = LatentConfig(8, 1, 96, 64, "bfloat16", "bfloat16", 32, 2, 0.1)
# DeepSeek-V2-Lite and -V3: 512 latent elements and 64 that are rotated
LITE = replace(SMALL, heads=16, key_dim=576, value_dim=512, scale=576**-0.5)
LARGE = replace(LITE, heads=128)


class Case:
    """Pages in random order, full of NaN where nothing was written, and queries."""

    def __init__(self, cfg: LatentConfig, batch: list[tuple[int, int]], preset: str = "sm_90") -> None:
        rng = np.random.default_rng(1)
        self.caps = gpu(preset)
        self.cfg, self.batch, ps = cfg, batch, cfg.page_size
        width = max(-(-context // ps) for _, context in batch) + 1
        pages = 1 + len(batch) * width
        self.table = rng.permutation(np.arange(1, pages)).reshape(len(batch), width).astype(np.int32)
        self.keys = [TOOLS.random(rng, (1, c, cfg.key_dim), cfg.dtype) for _, c in batch]
        self.pool = np.full((pages, cfg.layers, 1, cfg.key_dim, ps), np.nan, DTYPES[cfg.dtype])
        tokens = sum(new for new, _ in batch)
        self.q = TOOLS.random(rng, (1, cfg.heads, tokens, cfg.key_dim), cfg.dtype)
        self.start = np.cumsum([0, *(new for new, _ in batch)]).astype(np.int32)

    def append(self) -> None:
        ps = self.cfg.page_size
        where = [
            self.table[b, np.arange(c) // ps] * ps + np.arange(c) % ps for b, (_, c) in enumerate(self.batch)
        ]
        kernel = TOOLS.build(self.caps, k=kv_append(self.cfg, self.caps))["k"]
        k, slots = np.concatenate(self.keys, 1)[None], np.concatenate(where).astype(np.int32)
        kernel(TOOLS.tensor(k), TOOLS.tensor(slots), TOOLS.tensor(self.pool), 1)

    def error(self, decode: bool) -> float:
        """Largest error against numpy in float64."""
        cfg = self.cfg
        build = attention_decode if decode else attention_prefill
        out = np.full((1, self.q.shape[2], cfg.heads, cfg.value_dim), np.nan, DTYPES[cfg.dtype])
        context = np.array([c for _, c in self.batch], np.int32)
        arrays = [self.q, self.pool, self.start, context, self.table]
        part = [np.full((len(self.batch), *partial_shape(cfg)), np.nan, np.float32)] if decode else []
        kernel = TOOLS.build(self.caps, k=build(cfg, self.caps))["k"]
        kernel(*map(TOOLS.tensor, arrays), 1, TOOLS.tensor(out), *map(TOOLS.tensor, part))
        errors = []
        for b, keys in enumerate(self.keys):
            tokens = slice(self.start[b], self.start[b + 1])
            wide, q = keys.astype(np.float64), self.q[0, :, tokens].astype(np.float64)
            expected = reference(cfg, q, wide, wide[..., : cfg.value_dim], None, None)
            errors.append(np.abs(out[0, tokens].astype(np.float64) - expected).max())
        return float(np.max(errors))


EACH = [
    pytest.param(SMALL, 450, id="small"),
    *(
        pytest.param(cfg, context, id=name, marks=pytest.mark.slow)
        for name, cfg, context in (
            (
                "small-f16",
                replace(SMALL, dtype="float16", kv_dtype="float16", sinks_dtype="", page_size=16),
                450,
            ),
            ("many-heads", replace(SMALL, heads=80, softcap=4.0, window=90), 450),
            ("lite", LITE, 300),
            ("large", LARGE, 150),
        )
    ),
]


@pytest.mark.parametrize(("cfg", "context"), EACH)
def test_latents_against_numpy(cfg: LatentConfig, context: int) -> None:
    case = Case(cfg, [(5, 5), (1, 33), (14, 90)])
    case.append()
    assert case.error(decode=False) < 2 * TOOLS.exact[cfg.dtype]
    case = Case(cfg, [(1, 1), (1, context), (1, 33)])
    case.append()
    assert case.error(decode=True) < TOOLS.exact[cfg.dtype]


@pytest.mark.parametrize(
    ("cfg", "preset"),
    [
        (
            replace(SMALL, dtype="float32", kv_dtype="float32", sinks_dtype="", key_dim=40, value_dim=24),
            "sm_90",
        ),
        (replace(SMALL, window=30, has_sinks=False), "sm_75"),
    ],
    ids=["float32", "sm_75"],
)
def test_latents_without_matrix_units(cfg: LatentConfig, preset: str) -> None:
    """What the matrix units do not take goes thread by thread."""
    case = Case(cfg, [(5, 5), (1, 33), (14, 90)], preset)
    case.append()
    assert case.error(decode=False) < 2 * TOOLS.exact[cfg.dtype]
    case = Case(cfg, [(1, 1), (1, 200)], preset)
    case.append()
    assert case.error(decode=True) < TOOLS.exact[cfg.dtype]


def test_a_config_that_is_none() -> None:
    with pytest.raises(ValueError, match="one cached head"):
        replace(SMALL, kv_heads=2)
    assert flash_latent.shape(SMALL, gpu("sm_75"), 1) is None
    assert flash_latent.shape(replace(SMALL, dtype="float32", kv_dtype="float32"), gpu(), 1) is None
    assert flash_latent.shape(SMALL, gpu("sm_80"), 1) is not None


def run_small(decode: bool) -> None:
    cfg = replace(SMALL, heads=16, decode=ByRows((DecodeSchedule(splits=1),)))
    case = Case(cfg, [(1, 130)])
    case.pool[...] = 1
    case.error(decode)


# the last one is behind the zeros that follow the last key
@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1, 2, 3])
def test_without_a_barrier_there_is_a_race(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = g.barrier

    def barrier() -> None:
        if len(seen) != number:
            original()
        seen.append(0)

    monkeypatch.setattr(g, "barrier", barrier)
    with pytest.raises(SimulationError, match="simulate-race"):
        run_small(decode=False)
    assert len(seen) == 4


@needs_compiler
@pytest.mark.slow(reason="four kernels of long source per architecture")
@pytest.mark.parametrize("preset", [p for p in BACKEND.presets if p != "sm_75"])
def test_latent_attention_assembles_without_spills(preset: str) -> None:
    caps = capabilities(preset)
    for heads in (16, 128):
        cfg = with_defaults(replace(LARGE, heads=heads, token_major=True), caps)
        funcs = {"prefill": attention_prefill(cfg, caps), "decode": attention_decode(cfg, caps)}
        _, _, kernels = build_kernels(funcs, tvm_target(caps), (preset,))
        assert not [k for k in kernels if k.spill_bytes or k.stack_bytes], kernels
