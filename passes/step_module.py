"""Typed results of the lowering phase: a graph whose parameters are packed weights, and the step functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.artifact import TensorSpec
from llmc.frontend.graph import ModelGraph
from llmc.ir import IRModule
from llmc.kv_plan import KVPlan

if TYPE_CHECKING:
    from llmc.passes.fold_weights import WeightExpression
    from llmc.schedules.attention import AttentionConfig
    from llmc.schedules.rope import RopeConfig


@dataclass(frozen=True)
class PackedParam:
    """A parameter of the compiled functions and how it is made from the checkpoint.

    Attributes:
        name: name in the manifest; the source's name, with a suffix if one source is stored twice.
        source: name of the tensor in the source model.
        dtype: element type in the artifact; the source is cast to it.
        shape: shape in the artifact.
        layout: ``rows`` (as in the source), or the text of a BlockedLayout or QuantLayout; see schedules/*layout.py.
        transposed: the source is [in, out] (GPT-2's Conv1D) and is transposed before packing.
        more: further sources, whose rows follow those of `source`.
        scheme: how the weight is quantized; "" = not at all. QuantizeWeights decides, the lowering passes lay out.
        gated: the rows are two halves (gate and up) that are packed in turns, half a block of each.
        expression: what is computed from the sources when they are packed (FoldWeights); None: they are taken as they are.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "rows"
    transposed: bool = False
    more: tuple[str, ...] = ()
    gated: bool = False
    scheme: str = ""
    expression: WeightExpression | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source tensor, in the order of their rows."""
        return (self.source, *self.more)

    @property
    def layout_text(self) -> str:
        """What the manifest says of the layout."""
        if self.expression is not None:
            return f"{self.layout}, of {' '.join(self.expression.steps)}"
        return f"{self.layout}, gate and up in turns" if self.gated else self.layout


@dataclass(frozen=True)
class LoweredGraph:
    """A graph between ModelGraph and StepModule.

    ``main(input_ids, positions, *params)``: params[i] describes the i-th parameter after the two inputs.
    """

    module: IRModule
    params: tuple[PackedParam, ...]

    @staticmethod
    def from_model(graph: ModelGraph) -> LoweredGraph:
        params = tuple(PackedParam(p.name, p.name, p.dtype, p.shape) for p in graph.params)
        return LoweredGraph(graph.module, params)

    def as_text(self) -> str:
        return self.module.script()


@dataclass(frozen=True)
class StepModule:
    """The step functions of DESIGN 3.2.

    Attributes:
        module: IRModule with ``step`` (and ``decode`` once specialised) and the kernels that they call.
        params: packed weights, in the order of the params tuple.
        kv_plan: page tables and pools.
        inputs: arguments before the two tuples, in order.
        output: the logits.
        attention: (function name, configuration) of every attention kernel in ``step``.
        rope: likewise of the kernels that rotate queries and append to the cache.
    """

    module: IRModule
    params: tuple[PackedParam, ...]
    kv_plan: KVPlan
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    attention: tuple[tuple[str, AttentionConfig], ...] = ()
    rope: tuple[tuple[str, RopeConfig], ...] = ()

    def as_text(self) -> str:
        return self.module.script()
