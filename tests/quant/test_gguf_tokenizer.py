"""SentencePiece tokenizers are rebuilt from a GGUF file's tokens and scores."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from llmc.quant.readers.gguf_file import GGUFFile
from llmc.quant.readers.gguf_tokenizer import merges_by_score, write_tokenizer
from tests.quant.prequantized import DEMO
from tests.quant.test_gguf import write_gguf

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [
    "def f(self, x):\n    return x  # two  spaces",
    " leading and trailing ",
    "",
    "naïve 日本語 \U0001f600 \x00\t",
    "the theory of the other thing",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A BPE of the kind that llama's tokenizer.json is."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    text = (DEMO / "heldout.txt").read_text()[:60000]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator((" ".join(text.split()[i : i + 7]) for i in range(0, 8000, 7)), trainer)
    return tokenizer


def metadata(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """Tokens in the order in which they were made, with scores as SentencePiece gives them, and the bytes."""
    vocab = tokenizer.get_vocab()
    pieces = [t for t in sorted(vocab, key=vocab.__getitem__) if t not in SPECIAL]
    tokens = [*SPECIAL, *BYTES, *pieces]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def rebuilt(meta: dict[str, Any], folder: Path) -> Tokenizer:
    folder.mkdir()
    file = GGUFFile(write_gguf(folder.parent / f"{folder.name}.gguf", meta, {}))
    assert write_tokenizer(file, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def pieces_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule, as it is defined: join the neighbours whose union scores best, the leftmost of equals."""
    parts = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        unions = [a + b for a, b in itertools.pairwise(parts)]
        known = [(-scores[u], i) for i, u in enumerate(unions) if u in scores]
        if not known:
            break
        i = min(known)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out = []
    for part in parts:
        out += [part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()]
    return out


def test_equals_the_tokenizer_of_the_same_vocabulary(trained: Tokenizer, tmp_path: Path) -> None:
    meta = metadata(trained)
    ours = rebuilt(meta, tmp_path / "a")
    body = (DEMO / "heldout.txt").read_text()[60000:64000]
    compared = 0
    for text in (*TEXTS, *body.split("\n")):
        got = ours.encode(text, add_special_tokens=False)
        # the trained one has no tokens for bytes
        theirs = trained.encode(text, add_special_tokens=False).tokens
        if "<unk>" not in theirs:
            assert got.tokens == theirs
            compared += 1
        assert ours.decode(got.ids) == text
        assert ours.encode(text).ids == [1, *got.ids]
    assert compared > 20


def test_follows_the_scores(trained: Tokenizer, tmp_path: Path) -> None:
    """Random strings, and scores in another order than any training would give."""
    meta = metadata(trained)
    rng = random.Random(0)
    scores = meta["tokenizer.ggml.scores"]
    shuffled = scores[259:]
    rng.shuffle(shuffled)
    for name, values in (("a", scores), ("b", scores[:259] + shuffled)):
        ours = rebuilt({**meta, "tokenizer.ggml.scores": values}, tmp_path / name)
        known = dict(zip(meta["tokenizer.ggml.tokens"][259:], values[259:], strict=True))
        letters = [t for t in known if len(t) == 1 and t != SPACE] + [" ", "é"]
        for _ in range(60):
            text = "".join(rng.choices(letters, k=rng.randrange(40)))
            assert ours.encode(text, add_special_tokens=False).tokens == pieces_by_score(text, known)


def test_without_a_space_in_front(trained: Tokenizer, tmp_path: Path) -> None:
    """Gemma: no space is added, user-defined tokens are cut out first, one of them spaces."""
    meta = metadata(
        trained, **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_eos_token": True}
    )
    for token in ("<start_of_turn>", SPACE * 3):
        meta["tokenizer.ggml.tokens"].append(token)
        meta["tokenizer.ggml.scores"].append(-1000.0)
        meta["tokenizer.ggml.token_type"].append(4)
    ours = rebuilt(meta, tmp_path / "a")
    for text in ("x = 1", " x", "a   b", "<start_of_turn>user\n", ""):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert ours.encode(text).ids == [1, *ids, 2]
    assert ours.encode("<start_of_turn>x", add_special_tokens=False).tokens == ["<start_of_turn>", "x"]
    assert SPACE * 3 in ours.encode("a   b", add_special_tokens=False).tokens


def test_other_kinds_are_left_alone(trained: Tokenizer, tmp_path: Path) -> None:
    for kind in ("bert", "t5"):
        file = GGUFFile(
            write_gguf(tmp_path / "m.gguf", metadata(trained, **{"tokenizer.ggml.model": kind}), {})
        )
        assert not write_tokenizer(file, tmp_path)
    meta = metadata(trained)
    del meta["tokenizer.ggml.scores"]
    assert not write_tokenizer(GGUFFile(write_gguf(tmp_path / "m.gguf", meta, {})), tmp_path)


def test_merges_are_every_split() -> None:
    scored = [("a", -3.0), ("b", -4.0), ("ab", -1.0), ("abb", 0.0), ("bb", -2.0)]
    assert merges_by_score(scored) == [("a", "bb"), ("ab", "b"), ("a", "b"), ("b", "b")]
