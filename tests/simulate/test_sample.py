"""Sampling kernels in the simulator against the sampler of the host, for the same random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.runtime.device_sampler import packed_draws
from llmc.runtime.sampler import GREEDY, Draw, Sampler, SamplingParams
from llmc.runtime.sampler import choose as host_choice
from llmc.sample_layout import SampleConfig
from llmc.schedules.gpu.sample import sample
from tests.simulate.gpu import SimulatedTools, gpu


@pytest.fixture(scope="module")
def choose() -> Any:
    """Tokens of rows of logits for draws."""
    kernels: dict[int, Any] = {}

    def run(logits: np.ndarray, draws: list[Draw]) -> np.ndarray:
        vocab = logits.shape[1]
        cfg = SampleConfig(vocab)
        if vocab not in kernels:
            kernels[vocab] = SimulatedTools().build(gpu(), k=sample(cfg, gpu()))["k"]
        packed = packed_draws(draws, vocab)
        n = len(draws)
        scratch = [
            np.full((n, cfg.blocks), np.nan, np.float32),
            np.full((n, cfg.ints), -(2**31), np.int32),
            np.full((n, cfg.doubles), np.nan),
        ]
        tokens = np.full(n, -(2**31), np.int32)
        kernels[vocab](logits.copy(), *packed.arrays, *scratch, tokens, *packed.flags)
        return tokens

    return run


PARAMS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(1.0),
    SamplingParams(0.7, top_k=1),
    SamplingParams(0.7, top_k=20),
    SamplingParams(1.3, top_p=0.9),
    SamplingParams(1.0, top_p=0.3, repetition_penalty=1.2),
    SamplingParams(0.9, top_k=40, top_p=0.8, min_p=0.05),
    SamplingParams(2.0, min_p=0.2),
    SamplingParams(1.0, top_p=1e-9),
    SamplingParams(1.0, top_k=100000),
]


slow = pytest.mark.slow(reason="the same with other numbers")
KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 3,
    "ties": lambda rng, shape: rng.integers(-3, 4, shape) / 2,
    "all equal": lambda rng, shape: np.zeros(shape),
    "both zeros": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
}


@pytest.mark.parametrize(
    ("vocab", "kind", "turns"),
    [
        (300, "normal", 1),
        (9000, "ties", 1),
        *(pytest.param(vocab, kind, 3, marks=slow) for vocab in (300, 9000) for kind in KINDS),
    ],
)
def test_tokens_are_the_hosts(choose: Any, vocab: int, kind: str, turns: int) -> None:
    """Also for many equal logits, of which top-k keeps all and top-p the last ones, over block borders."""
    rng = np.random.default_rng(vocab)
    rows = KINDS[kind](rng, (len(PARAMS), vocab)).astype(np.float32)
    for turn in range(turns):
        samplers = [
            Sampler(SamplingParams(**{**vars(p), "seed": 17 * turn + i}), rng.integers(0, vocab, 30).tolist())
            for i, p in enumerate(PARAMS)
        ]
        draws = [s.draw() for s in samplers]
        expected = [host_choice(row, draw) for row, draw in zip(rows, draws, strict=True)]
        np.testing.assert_array_equal(choose(rows, draws), expected)


def test_logits_that_are_not_numbers(choose: Any) -> None:
    """The first NaN, else what is infinite, is named; the other rows are not touched."""
    rows = np.zeros((5, 300), np.float32)
    rows[0, [200, 7]] = np.nan
    rows[1, 9], rows[1, 100] = np.inf, np.nan
    rows[2] = -np.inf
    rows[3, 40] = 1
    rows[4, 50] = np.inf
    sampled = Draw(SamplingParams(0.5, top_k=3, top_p=0.5), 0.5, GREEDY.seen)
    np.testing.assert_array_equal(
        choose(rows, [GREEDY, sampled, sampled, GREEDY, sampled]), [-8, -101, -1, 40, -51]
    )
