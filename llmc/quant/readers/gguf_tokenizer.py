"""The byte-level BPE tokenizer in a GGUF file's metadata as tokenizer.json."""

from __future__ import annotations

import json
import shutil
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
_CONTROL, _USER = 3, 4
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
    tokenizer = _tokenizer(file)
    if tokenizer is None:
        return False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(_settings(file), ensure_ascii=False), encoding="utf-8"
    )
    return True


def _tokenizer(file: GGUFFile) -> dict[str, Any] | None:
    meta = file.metadata
    cut = str(meta.get("tokenizer.ggml.pre", "default"))
    if meta.get("tokenizer.ggml.model") != "gpt2" or cut not in _CUTS or "tokenizer.ggml.merges" not in meta:
        return None
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER)
    ]
    own = _CUTS[cut]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own is None}
    steps = [level]
    if own is not None:
        split = {"type": "Split", "pattern": {"Regex": own}, "behavior": "Isolated", "invert": False}
        steps = [split, level]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut in ("llama-bpe", "llama3"),
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def _settings(file: GGUFFile) -> dict[str, Any]:
    meta = file.metadata
    tokens = meta["tokenizer.ggml.tokens"]
    out: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            out[name] = tokens[number]
    if "tokenizer.chat_template" in meta:
        out["chat_template"] = meta["tokenizer.chat_template"]
    return out
