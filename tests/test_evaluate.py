"""Evaluation on a text: every token is scored once in the right context, and the figures are those of numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.errors import LlmcError
from llmc.evaluate import Window, cut, evaluate, standard_error
from llmc.evaluate_text import check_text, prefix_of, read_tokens

VOCAB = 50


def table_model(seed: int, noise: float = 0.0):
    """A model whose logits depend on the last token and the length of its context."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2
    table += np.random.default_rng(seed).normal(size=table.shape).astype(np.float32) * noise

    def logits(ids: Sequence[int]) -> np.ndarray:
        return table[np.array(ids)] + np.arange(len(ids), dtype=np.float32)[:, None] * table[:1] * 0.01

    return logits


def tokens(n: int) -> list[int]:
    return np.random.default_rng(3).integers(0, VOCAB, n).tolist()


# --- windows ---------------------------------------------------------------------------------------------------


def test_windows_without_overlap_score_all_but_their_first_token() -> None:
    ids = tokens(25)
    windows = cut(ids, window=10)
    assert [w.ids for w in windows] == [tuple(ids[:10]), tuple(ids[10:20]), tuple(ids[20:])]
    assert [w.scored for w in windows] == [9, 9, 4]


def test_a_stride_scores_every_token_once_with_more_context() -> None:
    ids = list(range(25))
    windows = cut(ids, window=10, stride=4)
    scored = [t for w in windows for t in w.ids[-w.scored :]]
    assert scored == list(range(1, 25))
    # after the first window each scored token has at least window - stride tokens before it
    assert all(len(w.ids) - w.scored >= 6 for w in windows[1:])


def test_a_begin_token_starts_each_window_and_gives_the_first_token_a_context() -> None:
    windows = cut(list(range(100, 120)), window=11, prefix=(7,))
    assert [w.ids[0] for w in windows] == [7, 7]
    assert [len(w.ids) for w in windows] == [11, 11]
    assert [w.scored for w in windows] == [10, 10]


def test_a_single_token_left_over_is_not_scored_without_context() -> None:
    assert [w.scored for w in cut(tokens(21), window=10)] == [9, 9]


def test_max_tokens_bounds_the_work() -> None:
    assert sum(len(w.ids) for w in cut(tokens(1000), window=16, max_tokens=64)) == 64


@pytest.mark.parametrize(
    ("ref", "options"),
    [
        ("text-too-short", {"window": 64}),
        ("text-too-short", {"window": 32, "max_tokens": 8}),
        ("window", {"window": 1}),
        ("stride", {"window": 16, "stride": 17}),
        ("stride", {"window": 16, "stride": 0}),
    ],
)
def test_impossible_windows_are_refused(ref: str, options: dict[str, int]) -> None:
    with pytest.raises(LlmcError) as caught:
        cut(tokens(40), **options)
    assert caught.value.ref == ref


def test_too_short_a_text_says_required_and_found() -> None:
    with pytest.raises(LlmcError, match=r"has 40 tokens.* at least one window of 512"):
        cut(tokens(40))


# --- figures ---------------------------------------------------------------------------------------------------


def test_perplexity_is_torchs_cross_entropy() -> None:
    model, ids = table_model(0), tokens(64)
    result = evaluate(model, cut(ids, window=16))
    losses = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(model(ids[i : i + 16]))[:-1], torch.tensor(ids[i + 1 : i + 16]), reduction="none"
        )
        for i in range(0, 64, 16)
    ]
    assert result.perplexity == pytest.approx(math.exp(torch.cat(losses).double().mean().item()), rel=1e-6)
    assert (result.tokens, result.windows, result.against) == (60, 4, None)


def test_divergence_is_torchs_and_rows_before_the_stride_do_not_count() -> None:
    model, exact, ids = table_model(1, 0.3), table_model(0), tokens(200)
    windows = cut(ids, window=50, stride=20)
    result = evaluate(model, windows, against=exact).against
    assert result is not None
    kl, same = [], []
    for w in windows:
        rows = slice(len(w.ids) - 1 - w.scored, len(w.ids) - 1)
        a, e = torch.from_numpy(model(w.ids)[rows]).double(), torch.from_numpy(exact(w.ids)[rows]).double()
        kl.append(
            torch.nn.functional.kl_div(a.log_softmax(1), e.log_softmax(1), log_target=True, reduction="none")
        )
        same.append(a.argmax(1) == e.argmax(1))
    rows_kl = torch.cat(kl).sum(1).numpy()
    assert result.kl_mean == pytest.approx(rows_kl.mean(), rel=1e-6)
    assert result.kl_p99 == pytest.approx(np.quantile(rows_kl, 0.99), rel=1e-6)
    assert result.top1_agreement == pytest.approx(torch.cat(same).double().mean().item())


def test_a_model_against_itself_differs_by_nothing() -> None:
    model = table_model(0)
    result = evaluate(model, cut(tokens(300), window=32), against=model).against
    assert result is not None
    assert (result.increase_percent, result.increase_error, result.kl_mean) == (0.0, 0.0, 0.0)
    assert result.top1_agreement == 1.0


def test_increase_is_the_ratio_of_the_perplexities() -> None:
    windows = cut(tokens(400), window=32)
    result = evaluate(table_model(1, 0.5), windows, against=table_model(0))
    assert result.against is not None
    ratio = result.perplexity / result.against.perplexity - 1
    assert result.against.increase_percent == pytest.approx(100 * ratio, rel=1e-9)
    assert result.against.perplexity == evaluate(table_model(0), windows).perplexity


def test_a_large_vocabulary_is_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = cut(tokens(200), window=64)
    whole = evaluate(table_model(1, 0.5), windows, against=table_model(0))
    monkeypatch.setattr("llmc.evaluate._PIECE", 7 * VOCAB)
    assert evaluate(table_model(1, 0.5), windows, against=table_model(0)) == whole


def test_a_token_that_the_reference_excludes_does_not_spoil_the_divergence() -> None:
    exact = table_model(0)

    def masked(ids: Sequence[int]) -> np.ndarray:
        out = exact(ids)
        out[:, VOCAB - 1] = -np.inf
        return out

    result = evaluate(exact, [Window((1, 2, 3), 2)], against=masked).against
    assert result is not None and 0 < result.kl_mean < 1


def test_standard_error_is_that_of_independent_values_and_grows_with_correlation() -> None:
    rng = np.random.default_rng(0)
    independent = rng.normal(size=64 * 400)
    assert standard_error(independent) == pytest.approx(1 / math.sqrt(len(independent)), rel=0.1)
    # the same values, each repeated 16 times: a sixteenth of the information
    repeated = np.repeat(rng.normal(size=64 * 400), 16)
    assert standard_error(repeated) == pytest.approx(1 / math.sqrt(64 * 400), rel=0.15)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = table_model(0)

    def broken(ids: Sequence[int]) -> np.ndarray:
        return np.where(np.arange(len(ids))[:, None] == 3, np.nan, model(ids))

    with pytest.raises(LlmcError, match="The model gives NaN"):
        evaluate(broken, cut(tokens(64), window=16))
    with pytest.raises(LlmcError, match="The reference gives NaN"):
        evaluate(model, cut(tokens(64), window=16), against=broken)


def test_another_vocabulary_is_refused() -> None:
    model = table_model(0)
    with pytest.raises(LlmcError, match="predicts 50 tokens, the reference 49"):
        evaluate(model, cut(tokens(64), window=16), against=lambda ids: model(ids)[:, 1:])


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[float, float]] = []
    evaluate(table_model(0), cut(tokens(64), window=16), progress=lambda d, t, _: seen.append((d, t)))
    assert seen == [(15, 60), (30, 60), (45, 60), (60, 60)]


# --- texts -----------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of characters with a begin token, as far as an evaluation needs one."""

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return [1, *map(ord, text)] if special_tokens else list(map(ord, text))


def test_a_long_text_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("é".encode() * 5000 + b"\xff" * 100000)  # the end is not UTF-8
    assert read_tokens(path, Words(), 100) == [ord("é")] * 100
    with pytest.raises(LlmcError, match="not UTF-8"):
        read_tokens(path, Words())


def test_a_short_text_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("abc")
    assert read_tokens(path, Words(), 100) == [97, 98, 99]


def test_the_begin_token_is_found() -> None:
    assert prefix_of(Words()) == (1,)


def test_texts_that_cannot_do_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="cannot be read: No such file"):
        check_text(tmp_path / "none")
    with pytest.raises(LlmcError, match="cannot be read: Is a directory"):
        check_text(tmp_path)
    (tmp_path / "short").write_text("x" * 100)
    with pytest.raises(LlmcError, match="has 100 bytes; at least 512 tokens"):
        check_text(tmp_path / "short")
