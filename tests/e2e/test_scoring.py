"""Log-likelihoods and generation in ragged batches, and the harness's adapter, against transformers in float32."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import llmc
from llmc.errors import LlmcError
from llmc.pipeline import compile_model
from llmc.scoring import Continuation, Generation, generate_until, loglikelihoods, rolling, split_pair
from tests.shared import made_once
from tests.texts import random_text, save_tiny

pytestmark = pytest.mark.e2e

LIMIT = 64


def make_folder(folder: Path) -> None:
    save_tiny(folder / "checkpoint")
    compile_model(
        str(folder / "checkpoint"),
        folder / "artifact",
        dtype="f32",
        verify="off",
        max_seq_len=LIMIT,
        max_batch=4,
        page_size=16,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint/ and artifact/; only to be read."""
    return made_once(tmp_path_factory, "scoring", make_folder)


@pytest.fixture(scope="module")
def source(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", dtype=torch.float32
    ).eval()


def expected(source: Any, context: Sequence[int], tokens: Sequence[int]) -> tuple[float, bool]:
    """By one run of transformers on the tokens that fit."""
    ids = [*context, *tokens][-(LIMIT + 1) :]
    with torch.no_grad():
        rows = source(torch.tensor([ids[:-1]])).logits[0, -len(tokens) :]
    targets = torch.tensor(list(tokens))
    logprobs = rows.double().log_softmax(1)[torch.arange(len(tokens)), targets]
    return float(logprobs.sum()), bool((rows.argmax(1) == targets).all())


def ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 36, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def greedy(source: Any, prompt: Sequence[int], n: int) -> list[int]:
    out = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            out.append(int(source(torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(prompt) :]


# --- log-likelihoods -------------------------------------------------------------------------------------------


def test_ragged_batches_give_the_log_likelihoods_of_single_runs(folder: Path, source: Any) -> None:
    model = llmc.load(folder / "artifact")
    shapes = [(5, 3), (1, 1), (40, 2), (17, 30), (1, 64), (60, 5), (100, 4), (33, 1)]
    requests = [Continuation(ids(c, i), ids(n, 100 + i)) for i, (c, n) in enumerate(shapes)]
    # one that is greedy
    prompt = ids(12, 50)
    requests.append(Continuation(prompt, tuple(greedy(source, prompt, 4))))
    for request, score in zip(requests, loglikelihoods(model, requests), strict=True):
        logprob, is_greedy = expected(source, request.context, request.tokens)
        assert score.logprob == pytest.approx(logprob, abs=2e-3)
        assert score.greedy == is_greedy
    assert loglikelihoods(model, requests)[-1].greedy
    assert model.memory().kv_in_use == 0


def test_choices_of_one_token_are_run_once(
    folder: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llmc.load(folder / "artifact")
    context = ids(20, 1)
    requests = [Continuation(context, (t,)) for t in (3, 4, 5, 6, 7, 8)]
    steps: list[int] = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda batch, **k: (steps.append(len(batch)), step(batch, **k))[1])
    scores = loglikelihoods(model, requests)
    assert steps == [1, 1]
    for request, score in zip(requests, scores, strict=True):
        assert score.logprob == pytest.approx(expected(source, context, request.tokens)[0], abs=1e-3)


def test_a_small_cache_makes_smaller_batches(folder: Path) -> None:
    roomy, tight = llmc.load(folder / "artifact"), llmc.load(folder / "artifact", kv_pages=6)
    requests = [Continuation(ids(30 + i, i), ids(4, i)) for i in range(6)]
    wanted = [s.logprob for s in loglikelihoods(roomy, requests)]
    assert [s.logprob for s in loglikelihoods(tight, requests)] == pytest.approx(wanted, abs=1e-4)
    assert tight.memory().kv_in_use == 0


def test_empty_and_too_long_continuations_are_refused(folder: Path) -> None:
    model = llmc.load(folder / "artifact")
    with pytest.raises(LlmcError, match="at least one token"):
        loglikelihoods(model, [Continuation((), (1,))])
    with pytest.raises(LlmcError, match="65 tokens; the artifact takes 64"):
        loglikelihoods(model, [Continuation((1,), ids(65, 0))])


def test_a_rolled_text_scores_each_token_once_with_a_full_last_context() -> None:
    pieces = rolling(list(range(10, 20)), 0, 4)
    # the example in the harness's documentation of loglikelihood_rolling
    assert pieces == [
        Continuation((0,), (10, 11, 12, 13)),
        Continuation((13,), (14, 15, 16, 17)),
        Continuation((15, 16, 17), (18, 19)),
    ]
    assert rolling([], 0, 4) == []


def test_a_merge_across_the_boundary_leaves_something_to_score() -> None:
    assert split_pair([1, 2], [1, 2, 3]) == Continuation((1, 2), (3,))
    # the last token of the context changed: the harness takes what is behind it
    assert split_pair([1, 2], [1, 9, 3]) == Continuation((1, 2), (3,))
    # nothing is behind it: from the first that differs
    assert split_pair([1, 2], [1, 9]) == Continuation((1,), (9,))
    assert split_pair([1, 2, 3], [1, 9]) == Continuation((1,), (9,))


# --- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [None, 7])
def test_many_generations_side_by_side_are_those_of_transformers(
    folder: Path, source: Any, pages: int | None
) -> None:
    """More requests than fit the batch, of different lengths; with few pages some are put back and run again."""
    model = llmc.load(folder / "artifact", kv_pages=pages)
    requests = [Generation(ids(3 + 7 * i, i), max_tokens=6 + 3 * i) for i in range(6)]
    texts = generate_until(model, requests)
    for request, text in zip(requests, texts, strict=True):
        tokens = greedy(source, request.prompt, request.max_tokens)
        tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
        assert text == model.detokenize([*request.prompt, *tokens])[len(model.detokenize(request.prompt)) :]
    assert model.memory().kv_in_use == 0


def test_generation_ends_before_a_stop_string(folder: Path) -> None:
    model = llmc.load(folder / "artifact")
    prompt = ids(10, 4)
    whole = generate_until(model, [Generation(prompt, 20)])[0]
    stop = whole[5:8]
    assert generate_until(model, [Generation(prompt, 20, (stop, ""))])[0] == whole[: whole.index(stop)]


# --- the harness -----------------------------------------------------------------------------------------------


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llmc.lm_eval_adapter on what it uses of lm_eval; the harness itself brings a hundred packages."""
    registered: dict[str, type] = {}

    def register_model(name: str) -> Any:
        return lambda cls: registered.setdefault(name, cls)

    class LM:
        def __init__(self) -> None:
            self.started = True

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
    modules["lm_eval.api.model"] = types.ModuleType("lm_eval.api.model")
    modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"] = types.ModuleType("lm_eval.api.registry")
    modules["lm_eval.api.registry"].register_model = register_model  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llmc.lm_eval_adapter", raising=False)
    module = importlib.import_module("llmc.lm_eval_adapter")
    assert registered["llmc"] is module.LlmcLM
    yield module
    sys.modules.pop("llmc.lm_eval_adapter", None)


def test_the_adapter_scores_texts_as_transformers_does(adapter: Any, folder: Path, source: Any) -> None:
    lm = adapter.LlmcLM(artifact=str(folder / "artifact"), batch_size="auto")
    assert lm.started and lm.max_length == LIMIT
    pairs = [("hello there", " world"), ("", "abc"), ("spaces  ", "belong"), ("c", "a")]
    found = lm.loglikelihood([Instance(p) for p in pairs], disable_tqdm=True)
    code = lm.model.tokenize
    wanted = [
        (code("hello there"), code("hello there world")[len(code("hello there")) :]),
        ([0], code("abc")),
        (code("spaces"), code("spaces  belong")[len(code("spaces")) :]),
        # one token together, so nothing is left of the context
        ([0], code("ca")),
    ]
    for (logprob, is_greedy), (context, tokens) in zip(found, wanted, strict=True):
        reference = expected(source, context, tokens)
        assert logprob == pytest.approx(reference[0], abs=1e-3)
        assert is_greedy == reference[1]


def test_the_adapter_rolls_over_long_texts(adapter: Any, folder: Path, source: Any) -> None:
    lm = adapter.LlmcLM(artifact=str(folder / "artifact"), batch_size=2)
    texts = [random_text(150), "short", ""]
    found = lm.loglikelihood_rolling([Instance((t,)) for t in texts], disable_tqdm=True)
    for text, total in zip(texts, found, strict=True):
        pieces = rolling(lm.model.tokenize(text), 0, LIMIT)
        assert sum(len(p.tokens) for p in pieces) == len(lm.model.tokenize(text))
        assert total == pytest.approx(sum(expected(source, p.context, p.tokens)[0] for p in pieces), abs=5e-3)


def test_the_adapter_generates(adapter: Any, folder: Path, source: Any) -> None:
    lm = adapter.LlmcLM(artifact=str(folder / "artifact"))
    options = {"until": ["zzzz"], "do_sample": False, "temperature": 0.7, "max_gen_toks": 8}
    found = lm.generate_until([Instance(("some text", options)), Instance(("", options))], disable_tqdm=True)
    assert found[0] == lm.model.generate("some text", max_tokens=8, temperature=0).text
    assert found[1] == lm.model.generate([0], max_tokens=8, temperature=0).text


def test_a_tasks_options_are_understood(adapter: Any) -> None:
    assert adapter.generation([1], {"until": "\n", "max_new_tokens": 3}) == Generation((1,), 3, ("\n",))
    made = adapter.generation([1], {"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (made.sampling.temperature, made.sampling.top_p, made.max_tokens) == (0.5, 0.9, 256)
    assert adapter.generation([1], {"do_sample": False, "temperature": 0.5}).sampling.temperature == 0


def test_without_the_harness_one_sentence_says_what_to_install() -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    with pytest.raises(ModuleNotFoundError, match="pip install lm_eval"):
        importlib.import_module("llmc.lm_eval_adapter")
