"""GGUF models of the llama, qwen and gemma families: their metadata as a transformers config, their tensors by its names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import StoredTensor
from llmc.quant.readers.base import Entry, QuantizedFiles, Tensors
from llmc.quant.readers.gguf_blocks import FLOATS, KINDS, blocks_to_weight
from llmc.quant.readers.gguf_file import GGUFFile, GGUFTensor
from llmc.quant.weight import QuantizedWeight

# llama.cpp's architecture -> model type; whether q and k are permuted, and whether norms are stored plus one
_ARCHITECTURES = {
    "llama": ("llama", True, False),
    "qwen2": ("qwen2", False, False),
    "qwen3": ("qwen3", False, False),
    "gemma": ("gemma", False, True),
    "gemma2": ("gemma2", False, True),
    "gemma3": ("gemma3_text", False, True),
}
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INNER_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# (factor, low, high, original length) of the published llama 3 models, whose files hold only what follows from them
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
# layers of the 27-billion-parameter models
_LARGEST = {"gemma2": 46, "gemma3": 62}
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a checkpoint.

    Attributes:
        kind: transformers' model type.
        config: values for its config.
        files: the tensors under transformers' names.
        dtype: of most unquantized matrices, else float32.
    """

    kind: str
    config: dict[str, Any]
    files: QuantizedFiles
    dtype: str


def read_gguf(file: GGUFFile) -> GGUFModel:
    """A whole model.

    Raises:
        LlmcError: an architecture, tensor type, tensor or RoPE scaling that is not supported.
    """
    arch = str(file.metadata.get("general.architecture"))
    if arch not in _ARCHITECTURES:
        raise LlmcError(
            "gguf-architecture",
            f"{file.path} has general.architecture {arch!r}; llmc reads {', '.join(_ARCHITECTURES)}.",
            hint="Use the model's Hugging Face checkpoint.",
        )
    kind, permuted, plus_one = _ARCHITECTURES[arch]
    config = _config(file, arch)
    inner = {**_INNER, **(_INNER_GEMMA if arch in ("gemma2", "gemma3") else {})}
    files = _Files(file.path)
    entries = []
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FREQS:
            continue
        name = _name(file, tensor, inner)
        heads = 0
        if permuted and ".q_proj." in name:
            heads = config["num_attention_heads"]
        elif permuted and ".k_proj." in name:
            heads = config["num_key_value_heads"]
        if tensor.kind in FLOATS:
            files.add(_Float(file, tensor, heads, plus_one and name.endswith("norm.weight")), name)
            continue
        if tensor.kind not in KINDS:
            raise LlmcError(
                "gguf-type",
                f"Tensor {tensor.name!r} in {file.path} is stored as {tensor.kind}; llmc reads"
                f" {', '.join([*FLOATS, *KINDS])}.",
                hint="Use another quantization of the model, such as q8_0, q4_0 or q6_k.",
            )
        part = f"{name}#blocks"
        files.add(_Raw(file, tensor), part)
        build = _Build(part, tensor.kind, heads)
        entries.append(Entry(name, tensor.shape, KINDS[tensor.kind], (part,), build))
    kinds = [t.kind for t in file.tensors.values() if len(t.shape) == 2 and t.kind in FLOATS]
    common = max(set(kinds), key=kinds.count) if kinds else "f32"
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[common]
    return GGUFModel(kind, config, QuantizedFiles(files, entries), dtype)


def _name(file: GGUFFile, tensor: GGUFTensor, inner: Mapping[str, str]) -> str:
    stem, _, leaf = tensor.name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{leaf}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in inner:
        return f"model.layers.{parts[1]}.{inner[parts[2]]}.{leaf}"
    raise LlmcError(
        "gguf-tensor",
        f"{file.path} has a tensor {tensor.name!r}, which llmc does not know for"
        f" {file.metadata['general.architecture']!r}.",
        hint="Use the model's Hugging Face checkpoint.",
    )


def _config(file: GGUFFile, arch: str) -> dict[str, Any]:
    def get(key: str) -> Any:
        return file.metadata.get(f"{arch}.{key}")

    config = {ours: get(theirs) for theirs, ours in _FIELDS.items() if get(theirs) is not None}
    missing = [k for k, v in _FIELDS.items() if k in ("block_count", "embedding_length") and v not in config]
    embedding = file.tensors.get("token_embd.weight")
    if missing or embedding is None or "num_attention_heads" not in config:
        what = (
            "token_embd.weight" if embedding is None else f"{arch}.{(missing or ['attention.head_count'])[0]}"
        )
        raise LlmcError(
            "gguf-incomplete",
            f"{file.path} lacks {what}.",
            hint="Convert the model again, or download it again.",
        )
    for key in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        if isinstance(config.get(key), list):
            if len(set(config[key])) != 1:
                raise LlmcError(
                    "gguf-config",
                    f"{file.path} gives each layer its own {key}; one value for all is required.",
                    hint="Use the model's Hugging Face checkpoint.",
                )
            config[key] = config[key][0]
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch in _LARGEST:
        # not in the file: the largest models scale queries by the width of a head as it would be without head_dim
        whole = config["num_hidden_layers"] == _LARGEST[arch]
        heads = config["num_attention_heads"]
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if whole else config["head_dim"]
    if get("attention.sliding_window") is not None and arch in ("gemma2", "gemma3"):
        config["sliding_window"] = get("attention.sliding_window")
    if arch == "gemma3":
        # llama.cpp knows these from the architecture
        config["rope_parameters"] = {
            "full_attention": _rope(file, arch, config["head_dim"], 1e6),
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    else:
        config["rope_parameters"] = _rope(file, arch, config["head_dim"], 10000.0)
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[ours] = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    return config


def _rope(file: GGUFFile, arch: str, dim: int, default_theta: float) -> dict[str, Any]:
    theta = float(file.metadata.get(f"{arch}.rope.freq_base", default_theta))
    rotated = file.metadata.get(f"{arch}.rope.dimension_count", dim)
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    found: object = kind
    if _ROPE_FREQS in file.tensors:
        factors = file.rows(file.tensors[_ROPE_FREQS]).view("<f4").reshape(-1)
        for known in _LLAMA3:
            if np.allclose(factors, llama3_factors(theta, dim, *known), rtol=1e-4):
                names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
                return {"rope_type": "llama3", "rope_theta": theta, **dict(zip(names, known, strict=True))}
        found = "frequency factors other than those of llama 3"
    elif rotated != dim:
        found = f"dimension_count {rotated} of {dim}"
    elif kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    elif kind == "linear":
        factor = float(file.metadata[f"{arch}.rope.scaling.factor"])
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise LlmcError(
        "gguf-rope",
        f"{file.path} has RoPE scaling {found!r}; llmc reads none, linear and that of llama 3 from GGUF.",
        hint="Use the model's Hugging Face checkpoint.",
    )


def llama3_factors(
    theta: float, dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What the frequencies are divided by (Llama 3.1's RoPE scaling), float32 [dim / 2]."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = (original / wavelength - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    out = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, middle))
    return out.astype(np.float32)


def _unpermuted(rows: int, heads: int) -> np.ndarray:
    """Source row of every row: llama.cpp stores pairs of a rotation side by side, transformers in two halves."""
    index = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return np.ascontiguousarray(index.swapaxes(1, 2)).reshape(-1)


@dataclass(frozen=True)
class _Raw:
    """The blocks of a quantized tensor, uint8 [N, row bytes]."""

    file: GGUFFile
    tensor: GGUFTensor

    def shape(self) -> tuple[int, ...]:
        return (int(np.prod(self.tensor.shape[:-1])), self.tensor.row_bytes)

    def dtype(self) -> torch.dtype:
        return torch.uint8

    def read(self) -> torch.Tensor:
        return torch.from_numpy(self.file.rows(self.tensor))


@dataclass(frozen=True)
class _Float:
    """An unquantized tensor."""

    file: GGUFFile
    tensor: GGUFTensor
    heads: int
    plus_one: bool

    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def dtype(self) -> torch.dtype:
        return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[self.tensor.kind]

    def read(self) -> torch.Tensor:
        raw = torch.from_numpy(self.file.rows(self.tensor)).reshape(-1)
        value = raw.view(self.dtype()).reshape(self.tensor.shape)
        if self.heads:
            value = value[torch.from_numpy(_unpermuted(len(value), self.heads))]
        return value - 1 if self.plus_one else value


class _Build:
    def __init__(self, part: str, kind: str, heads: int) -> None:
        self._part, self._kind, self._heads = part, kind, heads

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        weight = blocks_to_weight(tensors[self._part].numpy(), self._kind)
        if not self._heads:
            return weight
        rows = _unpermuted(len(weight.codes), self._heads)
        return weight.map(lambda values: values[rows])


class _Files:
    """TensorFiles of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._readers: dict[str, _Raw | _Float] = {}
        self._index: dict[str, StoredTensor] = {}

    def add(self, reader: _Raw | _Float, key: str) -> None:
        self._readers[key] = reader
        self._index[key] = StoredTensor(key, self._path, reader.shape(), reader.dtype())

    def index(self) -> Mapping[str, StoredTensor]:
        return self._index

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: self._readers[key].read() for key in keys}
