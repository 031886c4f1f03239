"""Sampling against plain definitions and against transformers' processors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.runtime.sampler import Sampler, SamplingParams, _draw, candidates, penalised, token_logprob

RNG = np.random.default_rng(3)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def plain(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities f64[vocab] after temperature, top-k, top-p and min-p, token by token, by definition."""
    p = softmax(scores / np.float32(params.temperature))
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if params.top_k:
        kth = p[order[min(params.top_k, len(p)) - 1]]
        p = np.where(p >= kth, p, 0)
        p /= p.sum()
    if params.top_p < 1:
        total, keep = 0.0, set()
        for i in order:
            keep.add(i)
            total += p[i]
            if total >= params.top_p:
                break
        p = np.array([x if i in keep else 0 for i, x in enumerate(p)])
    p = np.where(p < params.min_p * p.max(), 0, p)
    return p / p.sum()


GRID = [
    SamplingParams(1.0),
    SamplingParams(0.7, top_k=10),
    SamplingParams(1.3, top_p=0.9),
    SamplingParams(0.8, top_p=0.05),
    SamplingParams(1.0, min_p=0.1),
    SamplingParams(1.5, top_k=50, top_p=0.8, min_p=0.02),
    SamplingParams(2.0, top_p=0.999),
    SamplingParams(1.0, top_k=10**6, top_p=0.5),
]


@pytest.mark.parametrize("params", GRID)
@pytest.mark.parametrize("vocab", [2, 57, 5000])
def test_candidates_are_those_of_the_definition(params: SamplingParams, vocab: int) -> None:
    for _ in range(5):
        scores = (RNG.standard_normal(vocab) * 3).astype(np.float32)
        ids, weights = candidates(scores, params)
        want = plain(scores, params)
        assert np.array_equal(ids, np.flatnonzero(want))
        assert np.allclose(weights / weights.sum(), want[ids], rtol=1e-5, atol=0)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.99, 1 - 1e-9])
def test_equal_logits_keep_the_right_share(top_p: float) -> None:
    ids, _ = candidates(np.zeros(100, np.float32), SamplingParams(1.0, top_p=top_p))
    assert len(ids) == math.ceil(100 * top_p - 1e-9)


@pytest.mark.parametrize("params", GRID)
def test_candidates_are_those_of_transformers(params: SamplingParams) -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers")
    lp = pytest.importorskip("transformers.generation.logits_process", reason="compares with transformers")
    scores = (RNG.standard_normal(3000) * 3).astype(np.float32)
    seen = [int(i) for i in RNG.integers(0, 3000, 40)]
    chain = [lp.RepetitionPenaltyLogitsProcessor(1.3), lp.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(lp.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(lp.MinPLogitsWarper(params.min_p))
    want = torch.tensor(scores)[None]
    for processor in chain:
        want = processor(torch.tensor([seen]), want)
    sampler = Sampler(SamplingParams(0.0, repetition_penalty=1.3), seen)
    ids, weights = candidates(penalised(scores, sampler.draw()), params)
    probabilities = torch.softmax(want[0].double(), -1).numpy()
    assert np.array_equal(ids, np.flatnonzero(probabilities))
    assert np.allclose(weights / weights.sum(), probabilities[ids], rtol=1e-5, atol=0)


def test_frequencies_follow_the_probabilities() -> None:
    scores = np.array([1.0, 0.0, -1.0, 2.0, -30.0], np.float32)
    sampler = Sampler(SamplingParams(1.0, seed=11))
    counts = np.bincount([sampler.sample(scores) for _ in range(20000)], minlength=5)
    assert np.abs(counts / 20000 - softmax(scores)).max() < 0.015


def test_draws_find_the_place_in_the_running_sum() -> None:
    weights = RNG.random(3000).astype(np.float32)
    weights[RNG.integers(0, 3000, 500)] = 0
    weights[-20:] = 0
    edges = np.cumsum(weights.astype(np.float64))
    for share in (0.0, *RNG.random(300), 1 - 2**-53):
        at = _draw(weights, share)
        assert weights[at] > 0
        assert edges[at] >= share * edges[-1] - 1e-9 and edges[at] - weights[at] <= share * edges[-1] + 1e-9


def test_a_seed_fixes_the_choices() -> None:
    rows = (RNG.standard_normal((50, 200)) * 2).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(1.0, top_p=0.95, seed=seed))
        return [sampler.sample(row) for row in rows]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_greedy_takes_the_first_best_and_ignores_filters() -> None:
    scores = np.array([0.5, 2.0, 2.0, -1.0], np.float32)
    assert Sampler(SamplingParams(0.0, top_p=0.1, top_k=3)).sample(scores) == 1


def test_repetition_penalty_counts_prompt_and_new_tokens() -> None:
    scores = np.array([3.0, 2.0, -1.0, 1.4], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), seen=[0, 2])
    assert [sampler.sample(scores) for _ in range(3)] == [1, 0, 0]  # 1.5 2 -2 1.4, then 1.5 1 -2 1.4
    assert np.array_equal(penalised(scores, sampler.draw()), np.array([1.5, 1.0, -2.0, 1.4], np.float32))
    assert scores[0] == 3


def test_logprobs_are_log_softmax() -> None:
    scores = (RNG.standard_normal(500) * 4).astype(np.float32)
    want = np.log(softmax(scores))
    got = token_logprob(scores, 17, 5)
    assert got.token_id == 17 and math.isclose(got.logprob, want[17], abs_tol=1e-9)
    best = np.argsort(-want)[:5]
    assert [i for i, _ in got.top] == list(best)
    assert np.allclose([x for _, x in got.top], want[best], rtol=0, atol=1e-9)
    assert token_logprob(scores, 0, 0).top == () and len(token_logprob(scores, 0, 9999).top) == 500


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    scores = np.zeros(10, np.float32)
    scores[4] = bad
    with pytest.raises(LlmcError, match=r"not finite \(token 4.*logits-not-finite"):
        Sampler(SamplingParams(temperature)).sample(scores)
    scores[4] = -np.inf  # masked tokens are fine
    assert Sampler(SamplingParams(temperature)).sample(scores) != 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_parameters_out_of_range(name: str, value: float) -> None:
    with pytest.raises(LlmcError, match=rf"{name} must be .*, found {value}"):
        SamplingParams(**{name: value})
