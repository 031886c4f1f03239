"""Generation: tokens, text, ends, streams; and no page stays behind, whatever happens."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.artifact import Limits
from llmc.errors import LlmcError
from llmc.runtime.request import Defaults
from llmc.runtime.sampler import SamplingParams

VOCAB = 4096  # of the example's tokenizer


def greedy(t: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(t.reference(ids)[-1].argmax()))
    return ids[len(prompt) :]


def scripted(toy: Any, tokens: list[int], **options: Any) -> Any:
    """A model that says `tokens`, whatever the prompt."""
    t = toy(vocab=VOCAB, tokenizer=True, **options)
    t.engine.table = np.zeros((VOCAB, VOCAB), np.float32)

    def before(call: int) -> None:
        t.engine.bias = np.zeros(VOCAB)
        t.engine.bias[tokens[min(call, len(tokens) - 1)]] = 5

    t.engine.before = before
    return t


def say(toy: Any, text: str, **options: Any) -> Any:
    """A model that says `text` and then an end token."""
    ids = toy(vocab=VOCAB, tokenizer=True).model.tokenize(text)
    return scripted(toy, [*ids, 2], eos_token_ids=(2,), **options)


def test_greedy_tokens_are_the_models(toy: Any) -> None:
    t = toy()
    result = t.model.generate([3, 1, 4], max_tokens=20)
    assert list(result.token_ids) == greedy(t, [3, 1, 4], 20)
    assert (result.finish_reason, result.prompt_tokens, result.text) == ("length", 3, "")
    assert result.logprobs is None and t.engine.calls[0] == ("step", 3, 1)
    assert set(t.engine.calls[1:]) == {("decode", 1, 1)} and len(t.engine.calls) == 20
    assert result.timings.prompt_tokens == 3 and result.timings.decode_steps == 19
    assert result.timings.prefill_seconds > 0 and result.timings.decode_tokens_per_second > 0
    assert t.model.generate(np.array([3, 1, 4]), max_tokens=5).token_ids == result.token_ids[:5]
    t.assert_nothing_held()


def test_sampling_is_reproducible(toy: Any) -> None:
    t = toy()

    def draw(seed: int | None, **more: Any) -> tuple[int, ...]:
        result: tuple[int, ...] = t.model.generate(
            [1, 2], max_tokens=30, temperature=30.0, seed=seed, **more
        ).token_ids
        return result

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert draw(3, top_k=1) == t.model.generate([1, 2], max_tokens=30).token_ids
    assert draw(1, repetition_penalty=5.0) != draw(1)


def test_end_tokens_and_limits(toy: Any) -> None:
    t = toy(limits=Limits(40, 1, 16))
    free = t.model.generate([3, 1, 4], max_tokens=12).token_ids
    end = free[4]
    first = free.index(end)
    ends = toy(limits=Limits(40, 1, 16), eos_token_ids=(end,))
    result = ends.model.generate([3, 1, 4], max_tokens=12)
    assert (result.token_ids, result.finish_reason) == (free[: first + 1], "stop")
    result = ends.model.generate([3, 1, 4], max_tokens=12, ignore_eos=True)
    assert (result.token_ids, result.finish_reason) == (free, "length")
    result = t.model.generate([3, 1, 4], max_tokens=12, stop=[end])
    assert (result.token_ids, result.finish_reason) == (free[: first + 1], "stop")
    result = t.model.generate([7] * 30, max_tokens=100)
    assert (len(result.token_ids), result.finish_reason) == (11, "length")  # the last one need not be stored
    assert len(t.model.generate([7] * 40, max_tokens=100).token_ids) == 1
    with pytest.raises(LlmcError, match=r"has 41 tokens; the artifact takes 40.*\[prompt-too-long\]"):
        t.model.generate([7] * 41)


def test_text_in_and_text_out(toy: Any) -> None:
    text = "def café():\n    return '🙂 日本'\n"
    t = say(toy, text)
    result = t.model.generate("import os", max_tokens=200)
    assert (result.text, result.finish_reason) == (text, "stop")
    assert result.token_ids == (*t.model.tokenize(text), 2)
    assert t.model.detokenize(result.token_ids) == text
    assert result.prompt_tokens == len(t.model.tokenize("import os"))


@pytest.mark.parametrize(
    ("stop", "want"), [("turn '", "a re"), (["zzz", "\n"], "a return 'x'"), ("nothing", "a return 'x'\n b")]
)
def test_stop_strings_span_tokens(toy: Any, stop: Any, want: str) -> None:
    text = "a return 'x'\n b"
    t = say(toy, text)
    result = t.model.generate("p", max_tokens=100, stop=stop)
    assert (result.text, result.finish_reason) == (want, "stop")
    t = say(toy, text)
    stream = t.model.generate("p", max_tokens=100, stop=stop, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == want == stream.result.text
    assert stream.result.token_ids == result.token_ids
    t.assert_nothing_held()


def test_a_stop_string_completed_by_held_back_text(toy: Any) -> None:
    """max_tokens ends the generation within a character; what is left is still searched and given out."""
    ids = toy(vocab=VOCAB, tokenizer=True).model.tokenize("x🙂")
    assert len(ids) > 2
    t = scripted(toy, ids)
    result = t.model.generate("p", max_tokens=len(ids) - 1)
    assert result.finish_reason == "length" and result.text.startswith("x\ufffd")
    t = scripted(toy, ids)
    result = t.model.generate("p", max_tokens=len(ids) - 1, stop="\ufffd")
    assert (result.text, result.finish_reason) == ("x", "stop")


def test_streams_give_a_piece_per_token(toy: Any) -> None:
    text = "for 🙂 in range(3):\n    print('日本')\n"
    t = say(toy, text)
    stream = t.model.generate("p", max_tokens=100, stream=True)
    with pytest.raises(LlmcError, match="stream-unfinished"):
        _ = stream.result
    first = next(stream)
    assert len(t.engine.calls) == 1, "the first piece needs no second step"
    pieces = [first, *stream]
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces)
    assert len(pieces) == len(stream.result.token_ids)
    assert list(stream) == [] and stream.result.text == text
    t.assert_nothing_held()


@pytest.mark.parametrize("end", ["close", "with", "del", "never started"])
def test_a_stream_left_early_leaves_no_page(toy: Any, end: str) -> None:
    t = say(toy, "a long text " * 20)
    stream = t.model.generate("p", max_tokens=100, stream=True)
    if end != "never started":
        next(stream)
        assert t.allocator.used_pages() == (1,)
    if end == "with":
        with stream:
            next(stream)
    elif end == "close":
        stream.close()
        assert list(stream) == []
    del stream
    gc.collect()
    t.assert_nothing_held()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("call", [0, 1, 30])
def test_failures_leave_no_page(toy: Any, error: type[BaseException], call: int) -> None:
    t = toy(limits=Limits(256, 4, 16))

    def fail(number: int) -> None:
        if number == call:
            raise error

    t.engine.before = fail
    with pytest.raises(error):
        t.model.generate([5] * 30, max_tokens=60)
    t.assert_nothing_held()


def test_many_generations_leave_no_page(toy: Any, make_group: Callable[..., Any]) -> None:
    from llmc.kv_plan import KVKind

    groups = [make_group(), make_group(KVKind.SLIDING_WINDOW, window=10, name="g1")]
    t = toy(groups, pages=4, limits=Limits(48, 1, 16))
    for length in range(1, 60):
        if length <= 47:
            t.model.generate([length % 50] * length, max_tokens=1 + length % 20)
        else:
            with pytest.raises(LlmcError):
                t.model.generate([1] * (length + 1), max_tokens=3)
        t.assert_nothing_held()
    full = toy(pages=3)  # 32 tokens
    for _ in range(5):
        with pytest.raises(LlmcError, match="kv-pool-exhausted"):
            full.model.generate([1] * 20, max_tokens=40)
        full.assert_nothing_held()


def test_logprobs(toy: Any) -> None:
    t = toy()
    result = t.model.generate([3, 1, 4], max_tokens=4, logprobs=2)
    assert result.logprobs is not None and [p.token_id for p in result.logprobs] == list(result.token_ids)
    rows = t.reference([3, 1, 4, *result.token_ids])[2:6].astype(np.float64)
    for got, row in zip(result.logprobs, rows, strict=True):
        want = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert got.logprob == pytest.approx(want[got.token_id], abs=1e-9)
        assert len(got.top) == 2 and got.top[0][1] == pytest.approx(want.max(), abs=1e-9)
    assert all(p.top == () for p in t.model.generate([3], max_tokens=2, logprobs=0).logprobs or ())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"has no tokens.*\[empty-prompt\]"),
        ([1], {"max_tokens": 0}, r"max_tokens must be at least 1, found 0"),
        ([1], {"temperature": -1.0}, r"temperature must be at least 0"),
        ([1], {"top_p": 0.0}, r"top_p must be above 0 and at most 1, found 0.0"),
        ([1], {"seed": -3}, r"seed must be at least 0, found -3"),
        ([1], {"logprobs": -1}, r"logprobs must be None or at least 0"),
        ([1], {"stop": ""}, r"stop string must not be empty"),
        ([1], {"stop": "x"}, r"no tokenizer, so a stop string.*\[no-tokenizer\]"),
        ([50], {}, r"0\.\.49, found 50"),
        ("text", {}, r"no tokenizer.json.*list of token ids.*\[no-tokenizer\]"),
        ([{"role": "user", "content": "hi"}], {}, r"no chat template.*\[no-chat-template\]"),
    ],
)
def test_bad_arguments(toy: Any, prompt: Any, options: dict[str, Any], message: str) -> None:
    t = toy()
    for stream in (False, True):
        with pytest.raises(LlmcError, match=message):
            t.model.generate(prompt, stream=stream, **options)
    assert t.engine.calls == []


def test_chat_messages_go_through_the_template(toy: Any) -> None:
    from llmc.runtime.chat import ChatTemplate

    t = say(toy, "fine")
    t.model._chat = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
        {"bos_token": "<|bos|>"},
    )
    messages = [{"role": "user", "content": "how are you"}]
    result = t.model.generate(messages, max_tokens=20)
    ids = [1, *t.model.tokenize("user: how are you\nassistant:")]
    assert t.model.apply_chat_template(messages) == "<|bos|>user: how are you\nassistant:"
    assert result.prompt_tokens == len(ids) and result.text == "fine"
    assert t.engine.tokens[0][1][: len(ids)].tolist() == ids


def test_checkpoints_defaults() -> None:
    assert Defaults.read({}, (2,)) == Defaults(SamplingParams(), frozenset({2}))
    assert Defaults.read({"eos_token_id": [5, 6], "temperature": 0.6}, (2,)) == Defaults(
        SamplingParams(), frozenset({2, 5, 6})
    )
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 7}
    assert Defaults.read(config, ()) == Defaults(SamplingParams(0.6, 20, 0.95), frozenset({7}))
    odd = {"do_sample": True, "temperature": "hot", "top_p": 7, "eos_token_id": None}
    assert Defaults.read(odd, (1,)) == Defaults(SamplingParams(1.0), frozenset({1}))


def test_arguments_override_the_checkpoints_defaults(toy: Any) -> None:
    t = toy()
    t.model._defaults = Defaults(SamplingParams(50.0), frozenset())
    free = t.model.generate([1], max_tokens=30, seed=1).token_ids
    best = t.model.generate([1], max_tokens=30, temperature=0).token_ids
    assert list(best) == greedy(t, [1], 30) != list(free)
    t.model._defaults = Defaults(SamplingParams(), frozenset())
    filtered = {t.model.generate([1], max_tokens=20, top_k=40, seed=s, stop=None).token_ids for s in range(8)}
    t.model._defaults = Defaults(SamplingParams(1.0), frozenset())
    assert filtered == {t.model.generate([1], max_tokens=20, top_k=40, seed=s).token_ids for s in range(8)}
