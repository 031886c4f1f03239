"""Opening the model: its structure, bounds and texts, checked before the long work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import Limits
from llmc.errors import LlmcError
from llmc.spec import CompileSpec

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel


def spec_of(model: Any, spec: CompileSpec | None, fields: Mapping[str, Any]) -> CompileSpec:
    name = str(model) if isinstance(model, (str, Path)) else "<python object>"
    if spec is None:
        return CompileSpec.from_json({"model": name, **fields})
    return spec.with_(model=name, **fields) if fields or spec.model != name else spec


def open_source(model: Any, spec: CompileSpec) -> SourceModel:
    """Open the model: its structure only; weights are read when they are needed."""
    from llmc.frontend.checkpoint import open_model

    return open_model(
        model if not isinstance(model, Path) else str(model),
        dtype=spec.dtype,
        revision=spec.revision,
        meta_weights=spec.meta_weights,
    )


def limits_of(spec: CompileSpec, source: SourceModel) -> Limits:
    """Bounds of the symbolic sizes; a sequence may not be longer than the model was made for."""
    longest = spec.max_seq_len or source.max_seq_len
    if longest > source.max_seq_len:
        raise LlmcError(
            "max-seq-len",
            f"{source.name} handles at most {source.max_seq_len} tokens; max_seq_len is {longest}.",
            hint=f"Use --max-seq-len {source.max_seq_len} or less.",
        )
    return Limits(longest, spec.max_batch, min(spec.max_step_tokens, max(longest, spec.max_batch)))


def check_tokens(spec: CompileSpec, source: SourceModel) -> None:
    """Refuse texts that have too few tokens before the long work."""
    if spec.calib_text:
        from llmc.quant.methods import Calibration

        Calibration(spec.quant_method, Path(spec.calib_text)).pieces(source)
    if spec.eval_text:
        from llmc.evaluate_text import FolderTokenizer, cut_text

        limit = limits_of(spec, source).max_seq_len
        tokenizer = FolderTokenizer(source.folder, source.name)
        cut_text(tokenizer, Path(spec.eval_text), limit, max_tokens=spec.eval_tokens)
