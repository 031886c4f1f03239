"""The tokenizer in a GGUF file's metadata as tokenizer.json: byte-level BPE, and SentencePiece's BPE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmc.quant.readers.gguf_file import GGUFFile

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how a text is cut before merging; None = byte-level BPE's own expression (GPT-2)
_CUTS: dict[str, str | None] = {
    "gpt-2": None,
    "default": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
# byte-level tokenizers that begin a text with bos if the file does not say
_WITH_BOS = ("llama-bpe", "llama3")
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece writes a space
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_tokenizer(file: GGUFFile, folder: Path) -> bool:
    """Put tokenizer files into `folder`: those that lie beside the GGUF file, else what its metadata says.

    Returns:
        False if there is nothing beside it and the metadata describe another kind of tokenizer.
    """
    if (file.path.parent / "tokenizer.json").is_file():
        for name in _COPIED:
            if (file.path.parent / name).is_file():
                shutil.copy(file.path.parent / name, folder / name)
        return True
    tokenizer = _tokenizer(file.metadata)
    if tokenizer is None:
        return False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(_settings(file), ensure_ascii=False), encoding="utf-8"
    )
    return True


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any] | None:
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2" and "tokenizer.ggml.merges" in meta:
        return _byte_level(meta)
    if kind == "llama" and "tokenizer.ggml.scores" in meta:
        return _sentencepiece(meta)
    return None


def _byte_level(meta: dict[str, Any]) -> dict[str, Any] | None:
    """GPT-2's kind: bytes as characters, merges in a list."""
    cut = str(meta.get("tokenizer.ggml.pre", "default"))
    if cut not in _CUTS:
        return None
    own = _CUTS[cut]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own is None}
    steps: list[dict[str, Any]] = [level]
    if own is not None:
        split = {"type": "Split", "pattern": {"Regex": own}, "behavior": "Isolated", "invert": False}
        steps = [split, level]
    merges = [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]]
    return {
        **_frame(meta, with_bos=cut in _WITH_BOS),
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(meta, merges, ignore_merges=cut in _WITH_BOS),
    }


def _sentencepiece(meta: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's BPE (llama, mistral, gemma): a whole text is merged, the pair with the best score first.

    Spaces are written as U+2581; the text, and what follows a control token, begins with one unless the file says
    otherwise. Characters without a token become the tokens of their bytes.
    """
    tokens, types = _tokens(meta)
    merges = merges_by_score(
        (token, score)
        for token, score, kind in zip(tokens, meta["tokenizer.ggml.scores"], types, strict=True)
        if kind in (_NORMAL, _USER)
    )
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else None
    return {
        **_frame(meta, with_bos=True, spaces=not prefix),
        "normalizer": {"type": "Sequence", "normalizers": [*steps, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(meta, merges, unknown=unknown, byte_fallback=_BYTE in types),
    }


def merges_by_score(scored: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every way to merge two tokens into a third, those that make the token with the best score first.

    SentencePiece has no list of merges: it joins the neighbours whose union has the best score, the leftmost of equals.
    """
    score_of = dict(scored)
    found = [
        (-score, i, token[:cut], token[cut:])
        for i, (token, score) in enumerate(score_of.items())
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]
    return [(left, right) for _, _, left, right in sorted(found, key=lambda m: m[:2])]


def _tokens(meta: dict[str, Any]) -> tuple[list[str], list[int]]:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    return tokens, list(meta.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens))


def _frame(meta: dict[str, Any], *, with_bos: bool, spaces: bool = False) -> dict[str, Any]:
    """What is common to all kinds: added tokens, and bos and eos around a text.

    Args:
        with_bos: whether bos begins a text if the file does not say.
        spaces: texts of added tokens have U+2581 for a space.
    """
    tokens, types = _tokens(meta)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": spaces and kind == _USER and _SPACE in token,
            "special": kind in (_CONTROL, _UNKNOWN),
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER, _UNKNOWN)
    ]
    around = {
        name: meta.get(f"tokenizer.ggml.{name}_token_id")
        for name, default in (("bos", with_bos), ("eos", False))
        if meta.get(f"tokenizer.ggml.add_{name}_token", default)
    }
    numbers = {name: n for name, n in around.items() if n is not None and n < len(tokens)}
    process = None
    if numbers:
        special = {name: {"SpecialToken": {"id": tokens[n], "type_id": 0}} for name, n in numbers.items()}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        single = [part for part in (special.get("bos"), text, special.get("eos")) if part is not None]
        process = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in numbers.values()
            },
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": process,
    }


def _bpe(
    meta: dict[str, Any],
    merges: Iterable[Iterable[str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])},
        "merges": [list(merge) for merge in merges],
    }


def _settings(file: GGUFFile) -> dict[str, Any]:
    meta = file.metadata
    tokens = meta["tokenizer.ggml.tokens"]
    out: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ):
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            out[name] = tokens[number]
    if "tokenizer.chat_template" in meta:
        out["chat_template"] = meta["tokenizer.chat_template"]
    return out
