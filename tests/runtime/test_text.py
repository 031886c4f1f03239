"""Text that arrives token by token: whole characters, spaces of words, stop strings over several tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from llmc.errors import LlmcError
from llmc.runtime.text import Detokenizer, StopFinder
from llmc.runtime.tokenizer import Tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "models" / "stdlib-llama" / "tokenizer.json"
TEXTS = [
    "def read_file(path):\n    return open(path).read()\n",
    "naïve café — 日本語のテキスト 🙂👩‍👩‍👧 𝔘𝔫𝔦 \u00e9\u0301 end",
    "🙂",
    "\ufffd real replacement \ufffd\ufffd characters \ufffd",
    " leading and trailing ",
]


def byte_fallback(path: Path) -> Path:
    """A tokenizer in the style of Llama 2: words with a leading mark, bytes for what has no token."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    for piece in ("▁", "a", "b", "é", "▁a", "ab", "▁ab"):
        vocab[piece] = len(vocab)
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    t = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    t.save(str(path))
    return path


def stream(words: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(words.push(i) for i in ids), words.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_hold_whole_characters(text: str) -> None:
    tokenizer = Tokenizer(EXAMPLE)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = stream(Detokenizer(tokenizer.decode), ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)
    for cut in range(1, len(ids)):  # a prompt that ends anywhere between characters
        prompt, rest = ids[:cut], ids[cut:]
        if not tokenizer.decode(prompt).endswith("\ufffd"):
            got = "".join(stream(Detokenizer(tokenizer.decode, prompt), rest))
            assert tokenizer.decode(prompt) + got == text


def test_word_spaces_and_byte_fallback(tmp_path: Path) -> None:
    """The first new word keeps its space after a prompt; characters made of byte tokens come whole."""
    tokenizer = Tokenizer(byte_fallback(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("ab 🙂 é ab")
    assert tokenizer.decode(ids[-1:]) == "ab"  # alone, it loses the space
    assert "".join(stream(Detokenizer(tokenizer.decode, ids[:-1]), ids[-1:])) == " ab"
    pieces = stream(Detokenizer(tokenizer.decode), ids)
    assert "".join(pieces) == "ab 🙂 é ab" and "🙂" in pieces and not any("\ufffd" in p for p in pieces)


def test_random_tokens_neither_crash_nor_wait_forever(tmp_path: Path) -> None:
    """Models with random weights give bytes that are no characters."""
    rng = random.Random(4)
    for path in (EXAMPLE, byte_fallback(tmp_path / "tokenizer.json")):
        tokenizer = Tokenizer(path)
        size = tokenizer._tokenizer.get_vocab_size()
        words = Detokenizer(tokenizer.decode)
        silent = 0
        for _ in range(400):
            silent = 0 if words.push(rng.randrange(3, size)) else silent + 1
            assert silent <= 16 and len(words._ids) <= 40
        broken = tokenizer.encode("🙂")[:1] * 60 if path == EXAMPLE else [0xF0 + 1] * 60
        assert len("".join(stream(Detokenizer(tokenizer.decode), broken))) >= 30


def test_special_tokens_give_no_text() -> None:
    words = Detokenizer(Tokenizer(EXAMPLE).decode)
    assert [words.push(2) for _ in range(200)] == [""] * 200
    assert len(words._ids) < 40


def test_the_begin_token_is_added_once() -> None:
    plain, with_bos = Tokenizer(EXAMPLE), Tokenizer(EXAMPLE, bos_token_id=1)
    ids = plain.encode("import os")
    assert with_bos.encode("import os") == [1, *ids]
    assert with_bos.encode("<|bos|>import os") == [1, *ids]
    assert with_bos.encode("import os", special_tokens=False) == ids
    assert with_bos.decode([1, *ids]) == "import os"
    assert with_bos.decode([1, *ids], skip_special_tokens=False) == "<|bos|>import os"


def test_settings_for_training_do_not_cut_prompts(tmp_path: Path) -> None:
    t = tokenizers.Tokenizer.from_file(str(EXAMPLE))
    t.enable_truncation(4)
    t.enable_padding(length=64)
    t.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[0]) == Tokenizer(EXAMPLE).encode(TEXTS[0])


def test_a_damaged_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(
        LlmcError, match=r"tokenizer.json is not a readable tokenizer.*\[tokenizer-unreadable\]"
    ):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "stops", "want", "found"),
    [
        ("hello world", ["lo w"], "hel", True),
        ("hello world", ["xyz"], "hello world", False),
        ("aaab", ["aab"], "a", True),
        ("one\n\ntwo", ["\n\n", "two"], "one", True),
        ("abcabd", ["abd", "bca"], "a", True),
        ("ends with a start of st", ["stop"], "ends with a start of st", False),
        ("x", [], "x", False),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_stop_strings(text: str, stops: list[str], want: str, found: bool, step: int) -> None:
    finder = StopFinder(stops)
    pieces = [finder.push(text[i : i + step]) for i in range(0, len(text), step)]
    given = "".join(pieces)
    assert want.startswith(given)
    assert given + ("" if finder.found else finder.flush()) == want and finder.found is found
    assert finder.push("more") == "" or not found


def test_text_is_held_back_only_as_long_as_needed() -> None:
    finder = StopFinder(["stop"])
    assert [finder.push(c) for c in ("a", "s", "t", "x", "s")] == ["a", "", "", "stx", ""]
    assert finder.flush() == "s"
