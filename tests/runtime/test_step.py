"""Ragged steps through the paged cache give what the tokens alone give."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from llmc.artifact import Limits
from llmc.errors import LlmcError
from llmc.kv_plan import KVKind
from llmc.runtime.engine import StepInputs
from llmc.runtime.sampler import Draw, Sampler, SamplingParams, choose
from llmc.runtime.sequence import Sequence
from llmc.runtime.stepper import Stepper
from tests.runtime.conftest import ToyEngine

RNG = np.random.default_rng(0)


def tokens(count: int, vocab: int = 50) -> list[int]:
    return [int(i) for i in RNG.integers(0, vocab, count)]


def kinds(make_group: Callable[..., Any]) -> dict[str, list[Any]]:
    return {
        "full": [make_group()],
        "window": [make_group(KVKind.SLIDING_WINDOW, window=20)],
        "sinks": [make_group(KVKind.SLIDING_WINDOW, window=20, sinks=5)],
        "chunked": [make_group(KVKind.CHUNKED, window=24)],
        "mixed": [
            make_group(),
            make_group(KVKind.SLIDING_WINDOW, window=17, name="g1"),
            make_group(KVKind.CHUNKED, window=32, name="g2"),
        ],
    }


@pytest.mark.parametrize("kind", ["full", "window", "sinks", "chunked", "mixed"])
@pytest.mark.parametrize("step_tokens", [64, 7])
def test_prefill_and_decode_match_the_reference(
    toy: Any, make_group: Callable[..., Any], kind: str, step_tokens: int
) -> None:
    """Prompts of several lengths, chunked or not, then tokens one by one, in one ragged batch."""
    t = toy(kinds(make_group)[kind], limits=Limits(256, 4, step_tokens))
    batch = [tokens(n) for n in (90, 1, 33)]
    for ids, got in zip(batch, t.model.logits_batch(batch, prefill=[60, 1, 33]), strict=True):
        assert np.array_equal(got, t.reference(ids))
    t.assert_nothing_held()
    ids = batch[0]
    assert np.array_equal(t.model.logits(ids, prefill=3), t.reference(ids))
    assert {(name, n == b) for name, n, b in t.engine.calls} >= {("decode", True), ("step", False)}


def test_prompts_and_single_tokens_mix_in_one_batch(toy: Any) -> None:
    t = toy()
    a, b, more = tokens(20), tokens(9), tokens(3)
    with t.model.new_sequence() as first, t.model.new_sequence() as second:
        last = t.model.step([(first, a)])
        assert last.shape == (1, 50) and np.array_equal(last[0], t.reference(a)[-1])
        rows = t.model.step([(first, [7]), (second, b)])
        assert np.array_equal(rows, [t.reference([*a, 7])[-1], t.reference(b)[-1]])
        rows = t.model.step([(second, np.array(more)), (first, [8])], logits="all")
        want = np.concatenate([t.reference(b + more)[-3:], t.reference([*a, 7, 8])[-1:]])
        assert np.array_equal(rows, want)
        assert (first.length, second.length) == (22, 12)
        t.model.step([(first, [1]), (second, [2])])
    assert [name for name, _, _ in t.engine.calls] == ["step", "step", "step", "decode"]
    t.assert_nothing_held()


def test_long_prompts_of_a_batch_go_through_several_steps(toy: Any) -> None:
    t = toy(limits=Limits(256, 4, 16))
    batch = [tokens(n) for n in (21, 3, 30)]
    sequences = [t.model.new_sequence() for _ in batch]
    rows = t.model.step(list(zip(sequences, batch, strict=True)))
    assert np.array_equal(rows, [t.reference(ids)[-1] for ids in batch])
    assert [n for _, n, _ in t.engine.calls] == [16, 16, 16, 6]
    for seq in sequences:
        seq.free()
    t.assert_nothing_held()


def test_windows_hold_few_pages(toy: Any, make_group: Callable[..., Any]) -> None:
    """A window of 20 tokens with 16-token pages: at most 3 pages while decoding, of hundreds of tokens."""
    t = toy([make_group(KVKind.SLIDING_WINDOW, window=20)], pages=6, limits=Limits(400, 1, 32))
    ids = tokens(300)
    most = 0

    def look(call: int) -> None:
        nonlocal most
        if call > 10:
            most = max(most, *t.allocator.used_pages())

    t.engine.before = look
    assert np.array_equal(t.model.logits(ids, prefill=200)[-1], t.reference(ids)[-1])
    assert most == 3


def test_bad_arguments_change_nothing(toy: Any) -> None:
    t = toy(limits=Limits(40, 2, 16))
    seq, other, third = (t.model.new_sequence() for _ in range(3))
    t.model.step([(seq, tokens(10))])
    done = t.model.new_sequence()
    done.free()
    for batch, message in (
        ([], r"at least one sequence.*\[empty-batch\]"),
        ([(seq, [1]), (other, [1]), (third, [1])], r"at most 2 sequences, found 3.*\[batch-too-large\]"),
        ([(seq, [1]), (seq, [2])], r"\[duplicate-sequence\]"),
        ([(other, [1]), (seq, [50])], r"0\.\.49, found 50.*\[token-out-of-vocabulary\]"),
        ([(seq, [-1])], r"found -1"),
        ([(seq, [])], r"found none.*\[token-ids\]"),
        ([(seq, [1.5])], r"found float64"),
        (
            [(other, [1]), (seq, tokens(31))],
            r"would have 41 tokens; the artifact takes 40.*\[sequence-too-long\]",
        ),
        ([(done, [1])], r"\[sequence-freed\]"),
    ):
        with pytest.raises(LlmcError, match=message):
            t.model.step(batch)
    assert (seq.length, other.length, t.allocator.used_pages()) == (10, 0, (1,))
    assert t.model.step([(seq, tokens(30))]).shape == (1, 50)


def test_a_full_pool_is_refused_with_numbers_and_changes_nothing(toy: Any) -> None:
    t = toy(pages=5, limits=Limits(256, 4, 16))
    a, b = t.model.new_sequence(), t.model.new_sequence()
    ids = tokens(33)
    t.model.step([(a, ids)])
    calls = len(t.engine.calls)
    # 3 of 4 pages are taken; the second round of this step would need a third page
    with pytest.raises(
        LlmcError, match=r"needs 2 more pages of 16 tokens, 1 of 4 are free.*kv-pool-exhausted"
    ):
        t.model.step([(b, tokens(20))])
    assert (a.length, b.length, t.allocator.used_pages(), len(t.engine.calls)) == (33, 0, (3,), calls)
    assert np.array_equal(t.model.step([(a, [5])])[0], t.reference([*ids, 5])[-1])
    a.free()
    assert t.model.step([(b, tokens(64))]).shape == (1, 50)


def test_a_failing_step_leaves_the_sequence_as_it_was(toy: Any) -> None:
    t = toy()
    seq = t.model.new_sequence()
    ids = tokens(15)
    t.model.step([(seq, ids)])

    def interrupt(call: int) -> None:
        raise KeyboardInterrupt

    t.engine.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        t.model.step([(seq, tokens(30))])
    assert seq.length == 15 and t.allocator.used_pages() == (1,)
    t.engine.before = lambda call: None
    assert np.array_equal(t.model.step([(seq, [9])])[0], t.reference([*ids, 9])[-1])


def test_a_forgotten_sequence_gives_its_pages_back(toy: Any) -> None:
    t = toy()
    seq = t.model.new_sequence()
    t.model.step([(seq, tokens(40))])
    del seq
    t.assert_nothing_held()


def test_prefill_must_fit_the_sequences(toy: Any) -> None:
    with pytest.raises(LlmcError, match=r"between 1 and the length.*\[3\].*found \[4\]"):
        toy().model.logits([1, 2, 3], prefill=4)


class SamplingToy(ToyEngine):
    """The toy on a device that samples."""

    def sample(self, function: str, inputs: StepInputs, draws: Seq[Draw]) -> list[int]:
        return [choose(row, draw) for row, draw in zip(self.run(function, inputs), draws, strict=True)]


def test_tokens_chosen_by_an_engine_are_the_samplers(toy: Any) -> None:
    """Also of prompts that take several steps, whose parts choose nothing that counts."""
    prompts = [list(range(1, 41)), [7], list(range(20, 50))]
    params = SamplingParams(1.0, top_k=5, repetition_penalty=1.5, seed=3)
    chosen = []
    for kind in (ToyEngine, SamplingToy):
        t = toy(limits=Limits(256, 4, 16))
        engine = kind(t.engine.plan, t.engine.pages, t.vocab)
        stepper = Stepper(engine, t.allocator, t.manifest.limits, t.vocab)
        sequences = [Sequence(t.allocator) for _ in prompts]
        samplers = [Sampler(params, p) for p in prompts]
        tokens = stepper.sample(list(zip(sequences, prompts, strict=True)), samplers)
        found = [tokens]
        for _ in range(3):
            tokens = stepper.sample([(s, [x]) for s, x in zip(sequences, tokens, strict=True)], samplers)
            found.append(tokens)
        chosen.append(found)
    assert chosen[0] == chosen[1]
