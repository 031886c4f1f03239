"""Write a checkpoint as GGUF and quantize it with llama.cpp's own quantizer; runs in the llama.cpp environment.

Source of the file format: ggml's docs/gguf.md; tensor and key names come from the `gguf` package.
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# llama_ftype of llama.h
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "BF16": 32}
# config.json's model_type -> (GGUF architecture, whether q and k rows are interleaved for the rotation)
ARCHITECTURES = {"llama": ("llama", True), "qwen2": ("qwen2", False)}
_STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def convert(checkpoint: Path, kind: str, output: Path) -> None:
    """Write `output`/model.gguf in the format `kind`."""
    target = output / "model.gguf"
    if kind == "BF16":
        write_gguf(checkpoint, target)
        return
    import llama_cpp

    whole = output / "bf16.gguf"
    write_gguf(checkpoint, whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    code = llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), params)
    whole.unlink()
    if code:
        raise SystemExit(f"llama_model_quantize failed with code {code}")


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint's tensors and hyperparameters, and a vocabulary of the right size without texts."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name, interleaved = ARCHITECTURES[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, name)
    writer.add_file_type(FILE_TYPES["BF16"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tied = config.get("tie_word_embeddings")
    for source, dtype, raw in tensors(checkpoint):
        if tied and source == "lm_head.weight":
            continue
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if interleaved and f".{projection}." in source:
                raw = interleave(raw, count)
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SystemExit(f"no GGUF name for {source}")
        add(writer, target, dtype, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(rows: Any, heads: int) -> Any:
    """Rows of q or k so that a rotation's two halves alternate.

    The checkpoint rotates element i of a head with element i + d/2, llama.cpp's llama architecture 2i with 2i + 1.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def add(writer: Any, name: str, dtype: str, raw: Any) -> None:
    """A matrix in its own dtype, a vector in float32 as llama.cpp wants it."""
    import gguf

    if raw.ndim == 1:
        writer.add_tensor(name, (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw)
    elif dtype == "BF16":
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, raw.view(np.uint8), raw_dtype=kind)
    else:
        writer.add_tensor(name, raw)


def tensors(checkpoint: Path) -> Iterator[tuple[str, str, Any]]:
    """(name, safetensors dtype, array; bfloat16 as uint16 bits) of every tensor, mapped and not read.

    Source: https://huggingface.co/docs/safetensors (a length, a JSON header, the data).
    """
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        (size,) = struct.unpack_from("<Q", mapped)
        for name, entry in json.loads(mapped[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            item = _STORED[entry["dtype"]]
            count = (end - begin) // np.dtype(item).itemsize
            flat = np.frombuffer(mapped, item, count, 8 + size + begin)
            yield name, entry["dtype"], flat.reshape(entry["shape"])


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
