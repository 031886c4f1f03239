"""Opening a model: its structure on the meta device and its weights behind a WeightSource."""

from __future__ import annotations

import json
import re
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel, WeightSource
from llmc.frontend.meta import from_config, persistent_buffers, skeleton
from llmc.frontend.tensor_files import TensorFiles, open_files
from llmc.frontend.weights import CheckpointWeights, ModuleWeights
from llmc.quant.readers import open_quantized
from llmc.quant.readers.base import QuantizedFiles
from llmc.quant.readers.gguf import read_gguf
from llmc.quant.readers.gguf_file import GGUFFile
from llmc.quant.readers.gguf_tokenizer import write_tokenizer
from llmc.quant.readers.source import QuantizedCheckpoint
from llmc.spec import DType

NO_LIMIT = 2**31 - 1
_LIMIT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


def open_model(
    model: str | torch.nn.Module | torch.export.ExportedProgram,
    *,
    dtype: DType | None,
    revision: str | None = None,
    meta_weights: bool = False,
) -> SourceModel:
    """Open a model for compiling.

    Args:
        model: Hugging Face folder or hub id, path of a ``.gguf`` or ``.pt2`` file, module, or exported program.
        dtype: of the module's weights and activations; None = the checkpoint's.
        revision: hub revision.
        meta_weights: open the structure alone; needs only config.json.

    Returns:
        SourceModel; its module's parameters are on the meta device and its computed buffers real.

    Raises:
        LlmcError: not found, unknown or unsupported architecture, weights missing, damaged or misshapen.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _open_program(model, dtype, "<exported program>", meta_weights)
    if isinstance(model, torch.nn.Module):
        return _open_module(model, dtype, meta_weights)
    if model.endswith(".pt2"):
        return _open_program(_load_pt2(model), dtype, model, meta_weights)
    if model.endswith(".gguf"):
        return _open_gguf(Path(model).expanduser(), model, dtype, meta_weights)
    return _open_folder(_folder_of(model, revision, meta_weights), model, dtype, meta_weights)


def _open_folder(folder: Path, name: str, dtype: DType | None, meta_weights: bool) -> SourceModel:
    raw = _read_config(folder)
    config = _parse_config(folder, raw)
    files = None if meta_weights else open_quantized(folder, raw, open_files(folder))
    stored = _checkpoint_dtype(config, files)
    module = _build(config, (dtype or stored).value, folder)
    return SourceModel(
        module=module,
        weights=None if files is None else _weights(files, module),
        config=raw,
        folder=str(folder),
        name=name,
        dtype=stored.value,
        model_type=str(config.model_type),
        max_seq_len=_limit(config),
    )


def _open_gguf(path: Path, name: str, dtype: DType | None, meta_weights: bool) -> SourceModel:
    file = GGUFFile(path)
    read = read_gguf(file)
    config = AutoConfig.for_model(read.kind, **read.config)
    module = _build(config, (dtype or DType(read.dtype)).value, path)
    # lives as long as the model: the artifact's tokenizer files are copied from here
    folder = tempfile.TemporaryDirectory(prefix="llmc-gguf-")
    weakref.finalize(module, folder.cleanup)
    raw = json.loads(config.to_json_string(use_diff=False))
    (Path(folder.name) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    write_tokenizer(file, Path(folder.name))
    return SourceModel(
        module=module,
        weights=None if meta_weights else QuantizedCheckpoint(read.files, module),
        config=raw,
        folder=folder.name,
        name=name,
        dtype=read.dtype,
        model_type=read.kind,
        max_seq_len=_limit(config),
    )


def _open_module(module: torch.nn.Module, dtype: DType | None, meta_weights: bool) -> SourceModel:
    config: Any = getattr(module, "config", None)
    is_hf = isinstance(module, PreTrainedModel)
    stored = _module_dtype(module)
    return SourceModel(
        module=skeleton(module, None if dtype in (None, stored) else dtype.value),
        weights=None if meta_weights else ModuleWeights.of(module),
        config=json.loads(config.to_json_string(use_diff=False)) if is_hf else {},
        folder=None,
        name=type(module).__name__,
        dtype=stored.value,
        model_type=str(config.model_type) if is_hf else type(module).__name__,
        max_seq_len=_limit(config) if is_hf else NO_LIMIT,
    )


def _open_program(
    program: torch.export.ExportedProgram, dtype: DType | None, name: str, meta_weights: bool
) -> SourceModel:
    module = program.module()
    stored = _module_dtype(module)
    if dtype not in (None, stored):
        raise LlmcError(
            "exported-dtype",
            f"{name} was exported in {stored.value}; {dtype.value} was asked for.",
            hint="Export the model in the dtype that you want, or leave --dtype away.",
        )
    return SourceModel(
        module=module,
        weights=None if meta_weights else ModuleWeights(program.state_dict, name),
        config={},
        folder=None,
        name=name,
        dtype=stored.value,
        model_type="exported",
        max_seq_len=NO_LIMIT,
        program=program,
    )


def _load_pt2(path: str) -> torch.export.ExportedProgram:
    if not Path(path).is_file():
        raise LlmcError("model-not-found", f"The file {path} does not exist.", hint="Check the path.")
    try:
        return torch.export.load(path)
    except Exception as e:  # torch raises anything from KeyError to RuntimeError on a damaged archive
        raise LlmcError(
            "pt2-damaged",
            f"{path} is not an exported program that torch {torch.__version__} can read: {str(e).splitlines()[0]}.",
            hint="Export it again with torch.export.save.",
        ) from None


def _folder_of(model: str, revision: str | None, meta_weights: bool) -> Path:
    """The local folder of a model: itself, or its snapshot from the hub."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(model):
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise LlmcError(
            "model-not-found",
            f"{model} {what}; a folder with config.json, a .gguf or .pt2 file or a Hugging Face id such as org/name is required.",
            hint="Check the path.",
        )
    import huggingface_hub

    patterns = (
        [list(_HUB_FILES[:1] + _HUB_FILES[2:])]
        if meta_weights
        else [list(_HUB_FILES), ["pytorch_model*.bin"]]
    )
    try:
        for wanted in patterns:
            folder = Path(
                huggingface_hub.snapshot_download(
                    model, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]
                )
            )
            if any(folder.glob("*.safetensors")):
                break
    except Exception as e:  # the hub client raises its own, requests' and OS errors
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise LlmcError(
            "hub-download",
            f"{model} is neither a local folder nor could it be downloaded from the Hugging Face hub"
            f"{f' at revision {revision}' if revision else ''}: {reason[:300].rstrip('.')}.",
            hint="Check the name and the network; for a gated model run `hf auth login` first.",
        ) from None
    return folder


def _read_config(folder: Path) -> Mapping[str, object]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LlmcError(
            "config-missing",
            f"{folder} has no config.json, so its architecture is unknown.",
            hint="Give the folder of a Hugging Face checkpoint.",
        ) from None
    except (OSError, ValueError) as e:
        raise LlmcError(
            "config-unreadable", f"{path} is not readable JSON: {e}.", hint="Download the checkpoint again."
        ) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise LlmcError(
            "config-without-type",
            f"{path} has no model_type, so its architecture is unknown.",
            hint="Add the model_type that transformers uses for this architecture.",
        )
    return raw


def _parse_config(folder: Path, raw: Mapping[str, object]) -> Any:
    """The config as transformers' object; refuses what is not a decoder-only language model."""
    import transformers

    kind = str(raw["model_type"])
    where = folder / "config.json"
    if kind not in CONFIG_MAPPING:
        custom = (
            " It needs code from the checkpoint itself, which llmc never runs." if "auto_map" in raw else ""
        )
        raise LlmcError(
            "unknown-architecture",
            f"{where} names model type {kind!r}, which transformers {transformers.__version__} does not know.{custom}",
            hint="Compile it from Python as an nn.Module, or use a checkpoint in transformers' own format.",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # validators of all architectures raise all kinds of errors
        raise LlmcError(
            "config-invalid",
            f"{where} is not a valid config of type {kind!r}: {' '.join(str(e).split())[:400]}.",
            hint="Correct the value, or download the checkpoint again.",
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        found = "an encoder-decoder model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        found = "an encoder"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = "not a language model that transformers can generate text with"
    else:
        return config
    raise LlmcError(
        "not-a-decoder",
        f"A decoder-only language model is required; {where} describes {kind!r}, which is {found}.",
        hint="Use a model that generates text from left to right.",
    )


def _weights(files: TensorFiles, module: PreTrainedModel) -> WeightSource:
    if isinstance(files, QuantizedFiles):
        return QuantizedCheckpoint(files, module)
    return CheckpointWeights(files, module)


def _build(config: Any, dtype: str, folder: Path) -> PreTrainedModel:
    try:
        return from_config(config, dtype)
    except LlmcError:
        raise
    except Exception as e:  # a value of config.json that the architecture's code stumbles over
        raise LlmcError(
            "config-invalid",
            f"{folder / 'config.json'} does not make a {config.model_type!r} model:"
            f" {type(e).__name__}: {' '.join(str(e).split())[:400]}.",
            hint="Correct the value, or install what the message names.",
        ) from e


def _checkpoint_dtype(config: Any, files: TensorFiles | None) -> DType:
    """What config.json says, else the first floating tensor's."""
    for candidate in (config.dtype, getattr(config.get_text_config(), "dtype", None)):
        if candidate is not None:
            name = str(candidate).removeprefix("torch.")
            if name in {d.value for d in DType}:
                return DType(name)
    if files is not None:
        for stored in files.index().values():
            name = str(stored.dtype).removeprefix("torch.")
            if name in {d.value for d in DType}:
                return DType(name)
    return DType.F32


def _module_dtype(module: torch.nn.Module) -> DType:
    for tensor in [*module.parameters(), *persistent_buffers(module).values()]:
        name = str(tensor.dtype).removeprefix("torch.")
        if name in {d.value for d in DType}:
            return DType(name)
    return DType.F32


def _limit(config: Any) -> int:
    """The longest sequence that the model was made for."""
    text = config.get_text_config()
    for name in _LIMIT_FIELDS:
        try:
            value = getattr(text, name, None)
        except NotImplementedError:  # how some configs say that they have no such thing
            continue
        if isinstance(value, int) and value > 0:
            return value
    return NO_LIMIT
