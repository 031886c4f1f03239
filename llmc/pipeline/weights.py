"""Stages that choose, change and write weights: search, calibrate, pack."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import ParamEntry
from llmc.pipeline.source import limits_of, open_source
from llmc.quant.schemes import NONE, QuantRules
from llmc.spec import CompileSpec
from llmc.stages import StageRunner
from llmc.writer import ArtifactWriter, PackedTensor

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import StepModule
    from llmc.quant.choose import QuantSearch
    from llmc.quant.orthogonal import Rotation


def search_schemes(model: Any, spec: CompileSpec, runner: StageRunner) -> QuantSearch:
    """Choose a scheme for each weight by measuring with torch."""
    from llmc.evaluate_text import FolderTokenizer, cut_text
    from llmc.quant.choose import SEARCHED, choose

    assert spec.eval_text is not None and spec.max_ppl_increase is not None
    source = open_source(model, spec)
    tokenizer = FolderTokenizer(source.folder, source.name)
    limit = limits_of(spec, source).max_seq_len
    windows = cut_text(tokenizer, Path(spec.eval_text), limit, max_tokens=spec.eval_tokens)
    probe = None
    if spec.calib_text:
        probe = cut_text(tokenizer, Path(spec.calib_text), limit, max_tokens=len(windows[0].ids))[0]
    return choose(
        source,
        windows,
        max_increase_percent=spec.max_ppl_increase,
        schemes=SEARCHED[spec.quant],
        fixed=_with_absorbed(spec, source),
        probe=probe,
        dtype=spec.dtype.value if spec.dtype else None,
        uniform=True,
        progress=runner.progress.advance,
    )


def _with_absorbed(spec: CompileSpec, source: SourceModel) -> QuantRules:
    """The spec's rules, with those weights left as they are that AbsorbLatent takes: no kernel reads codes of them."""
    from llmc.frontend.capture import capture
    from llmc.passes.absorb_latent import AbsorbLatent
    from llmc.passes.step_module import LoweredGraph

    rules = spec.rules()
    if AbsorbLatent.__name__ in spec.disable_passes:
        return rules
    graph = LoweredGraph.from_model(capture(source, max_seq_len=spec.max_seq_len))
    absorbed = [p for p in AbsorbLatent()(graph).params if p.expression is not None]
    names = dict.fromkeys(name for p in absorbed for name in p.sources)
    kept = tuple((glob.escape(name.removesuffix(".weight")), NONE) for name in names)
    return QuantRules(rules.default, (*rules.patterns, *kept))


def calibrate_source(
    step: StepModule, source: SourceModel, spec: CompileSpec, runner: StageRunner
) -> tuple[SourceModel, Rotation | None]:
    """The source rotated, pruned or factored as the spec says, with the weights that the graph wants quantized.

    Returns:
        that, and the rotation of its hidden states if the method rotates.
    """
    from llmc.quant.methods import Calibration, calibrated
    from llmc.schedules.qlayout import QuantLayout

    plan = {
        name: QuantLayout.parse(param.layout).of
        for param in step.params
        if QuantLayout.is_layout(param.layout)
        for name in param.sources
    }
    made, found = calibrated(
        source,
        plan,
        Calibration(
            spec.quant_method,
            None if spec.calib_text is None else Path(spec.calib_text),
            prune=spec.prune_rule(),
            svd=spec.rank_rule(),
        ),
        joined=[param.sources for param in step.params if QuantLayout.is_layout(param.layout)],
        progress=lambda done, total: runner.progress.advance(done, total, "layers"),
    )
    for note in found.notes:
        runner.progress.note(note)
    return made, found.stream


def pack_weights(
    step: StepModule, source: SourceModel, writer: ArtifactWriter, runner: StageRunner
) -> tuple[ParamEntry, ...]:
    """Stream the weights into the artifact's shards."""
    from llmc.packing import packed_tensors
    from llmc.quant.stored import SourceQuantizer

    tensors = [PackedTensor(p.name, p.shape, p.dtype, p.layout_text, p.sources) for p in step.params]
    if source.weights is None:  # --meta-weights: the graph alone
        return ()
    total = sum(t.nbytes for t in tensors)
    done = 0
    with writer.shards(tensors) as shards:
        for param, data in packed_tensors(step.params, source.weights, SourceQuantizer(source.weights)):
            shards.write(param.name, data)
            done += data.nbytes
            runner.progress.advance(done, total, param.name)
    return tuple(shards.entries)
