"""Quantization that looks at what a model does with a text: one decoder layer at a time, earlier ones already quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from llmc.frontend.graph import SourceModel
from llmc.products import InputRounding, RoundedInputs
from llmc.quant.orthogonal import Rotation
from llmc.quant.outliers import choose_columns, without_columns
from llmc.quant.overlay import OverlayWeights, QuantizedStore, StoredQuantizer
from llmc.quant.recorder import Moments, Recorder, Usage
from llmc.quant.rounding import Grid, best_grid, decode, encode, packed, plain_grid, stack
from llmc.quant.runner import HeldLayer, LayerRunner
from llmc.quant.schemes import Scheme
from llmc.quant.weight import QuantizedWeight


@dataclass
class LayerWork:
    """One decoder layer that is being quantized.

    Attributes:
        layer: its module and weights, float32, as the source model stores them; to be changed in place.
        plan: name -> scheme, of its weights that are to be quantized.
        usages: name -> how and with which inputs a weight is used, for all that have statistics.
        runner: for trying changes on the first sequence.
        changed: names of floating-point parameters that a method has changed.
        notes: what the report should say.
    """

    layer: HeldLayer
    plan: Mapping[str, Scheme]
    usages: dict[str, Usage]
    runner: LayerRunner
    changed: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


class Rounding(Protocol):
    """How one matrix is rounded."""

    def round(
        self, weight: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[torch.Tensor, Grid]:
        """(codes, grid) of weight float32 [N, K]; `moments` None: nothing is known of its inputs."""


class Method(Rounding, Protocol):
    """A calibrated method."""

    def prepare(self, work: LayerWork) -> None:
        """Change the layer's floating-point weights, without changing what the layer computes."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration has found.

    Attributes:
        weights: the source's weights with the changed and quantized ones in their place.
        quantizer: hands out the quantized ones.
        notes: what was not done as asked, and why; for the user to see.
        errors: name -> relative error of the layer's outputs on the calibration text, where it is known.
        stream: the rotation that hidden states between layers come with; None = they are the source model's.
    """

    weights: OverlayWeights
    quantizer: StoredQuantizer
    notes: tuple[str, ...]
    errors: dict[str, float]
    stream: Rotation | None = None


class Nearest:
    """Rounding to the nearest without statistics: what is left for weights that no input reached.

    Args:
        search: choose the scales by the error of the weights; else they cover the range, as llmc.quant.rtn has it.
    """

    def __init__(self, *, search: bool = True) -> None:
        self._search = search

    def prepare(self, work: LayerWork) -> None:
        """Nothing is changed beforehand."""

    def round(
        self, weight: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[torch.Tensor, Grid]:
        grid = best_grid(weight, scheme) if self._search else plain_grid(weight, scheme)
        return encode(weight, grid), grid


def calibrate(
    source: SourceModel,
    plan: Mapping[str, Scheme],
    sequences: torch.Tensor,
    method: Method,
    *,
    joined: Iterable[tuple[str, ...]] = (),
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Calibrated:
    """Quantize the weights in `plan` of a model, layer by layer.

    The inputs of a layer are those that it gets with all layers before it quantized, weights and activations.

    Args:
        source: an opened model with weights.
        plan: source name -> scheme. Names that the model multiplies nothing with are rounded to the nearest.
        sequences: int64 [n, length], see llmc.quant.corpus.
        method: GPTQ, AWQ or SmoothQuant.
        joined: weights that are packed as one: they get the same outlier columns.
        progress: called with (layers done, layers).
        folder: for the temporary files.
    """
    assert source.weights is not None
    members = {name: names for names in joined for name in names}
    run = _Run(source, dict(plan), method, QuantizedStore(folder), members)
    runner = LayerRunner(source, source.weights, sequences)
    runner.start()
    total = len(runner.layers) + 1
    for i, path in enumerate(runner.layers):
        with runner.held(path) as layer:
            run.layer(runner, layer)
            runner.advance(layer, partial(RoundedInputs.of, layer.parameters, run.roundings(layer)))
        if progress is not None:
            progress(i + 1, total)
    run.outside(runner)
    missing = [name for name in plan if run.store.scheme(name) is None]
    if missing:  # they would be packed as if they had not been calibrated
        raise AssertionError(f"not quantized: {', '.join(missing)}")
    if progress is not None:
        progress(total, total)
    return Calibrated(run.weights, StoredQuantizer(run.store), tuple(run.notes), run.errors)


@dataclass
class _Run:
    source: SourceModel
    plan: dict[str, Scheme]
    method: Method
    store: QuantizedStore
    joined: dict[str, tuple[str, ...]]
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # of outliers, where the scheme has them
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> OverlayWeights:
        """The source's weights with what was found so far."""
        assert self.source.weights is not None
        return OverlayWeights(self.source.weights, self.floats, self.store)

    def roundings(self, layer: HeldLayer) -> dict[str, InputRounding]:
        """How the inputs of a quantized layer's weights are rounded."""
        return {
            name: InputRounding.of(scheme, self.columns.get(name))
            for name, scheme in self.plan.items()
            if scheme.activation_bits and name in layer.parameters
        }

    def layer(self, runner: LayerRunner, layer: HeldLayer) -> None:
        """Quantize one layer; afterwards it holds the dequantized weights."""
        plan = {n: s for n, s in self.plan.items() if n in layer.parameters}
        for name in list(plan):
            if self.store.scheme(name) is not None:  # shared with a layer before
                layer.parameters[name].copy_(self.weights.load(name))
                del plan[name]
        if not plan:
            return
        recorder = Recorder(layer.parameters)
        runner.feed(layer, recorder.watch)
        work = LayerWork(layer, plan, recorder.finish(), runner)
        self.method.prepare(work)
        self.notes += work.notes
        self._choose_outliers(plan, layer.parameters, work.usages)
        for name, scheme in plan.items():
            self._matrix(name, layer.parameters[name], scheme, work.usages.get(name), recorder.problems)
        for name in sorted(work.changed - set(plan)):
            self.floats[name] = layer.parameters[name].clone()

    def outside(self, runner: LayerRunner) -> None:
        """Quantize what is outside of the layers: output projections, embeddings."""
        outer = runner.outer_names()
        plan = {n: s for n, s in self.plan.items() if n in outer}
        if not plan:
            return
        recorder = Recorder({})
        tensors: dict[str, torch.Tensor] = {}

        def watch(loaded: Mapping[str, torch.Tensor]) -> AbstractContextManager[Any]:
            nonlocal recorder, tensors
            if not tensors:
                tensors = dict(loaded)
                recorder = Recorder(tensors)
            return recorder.watch()

        runner.finish(plan, watch)
        usages = recorder.finish()
        self._choose_outliers(plan, tensors, usages)
        for name, scheme in plan.items():
            if name in usages or name in recorder.problems:
                self._matrix(name, tensors[name], scheme, usages.get(name), recorder.problems)
            else:  # an embedding of its own: rows are taken from it, nothing is multiplied
                quantized, _ = self._rounded(name, tensors[name], None, scheme)
                self.store.put(name, quantized)

    def _choose_outliers(
        self, plan: Mapping[str, Scheme], tensors: Mapping[str, torch.Tensor], usages: Mapping[str, Usage]
    ) -> None:
        """Outlier columns of the weights in `plan` whose scheme has them."""
        for name, scheme in plan.items():
            if scheme.outlier_share and name not in self.columns:
                names = self.joined.get(name, (name,))
                self.columns[name] = choose_columns(
                    scheme, [(tensors[n], usages.get(n)) for n in names if n in tensors]
                )
                self.columns.update(dict.fromkeys(names, self.columns[name]))

    def _rounded(
        self, name: str, matrix: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[QuantizedWeight, torch.Tensor]:
        """A matrix [N, K] as it is stored, and what that stands for."""
        known = moments is not None or isinstance(self.method, Nearest)
        rounding: Rounding = self.method if known else Nearest()
        columns = self.columns.get(name)
        if columns is None:
            codes, grid = rounding.round(matrix, moments, scheme)
            return packed(codes, grid), decode(codes if scheme.code.value == "int" else codes.long(), grid)
        codes, grid = rounding.round(*without_columns(matrix, moments, columns), scheme)
        kept = matrix[:, columns].to(torch.bfloat16).float()
        values = decode(codes, grid)
        values[:, columns] = kept
        made = replace(
            packed(codes, grid),
            outlier_weights=kept.numpy(),
            outlier_columns=columns.to(torch.int32).numpy(),
        )
        return made, values

    def _matrix(
        self,
        name: str,
        tensor: torch.Tensor,
        scheme: Scheme,
        usage: Usage | None,
        problems: Mapping[str, str],
    ) -> None:
        transposed = usage is not None and usage.transposed
        weight = tensor.transpose(-1, -2) if transposed else tensor
        parts = list(weight) if weight.ndim == 3 else [weight]
        moments = usage.moments if usage is not None else [None] * len(parts)
        unseen = sum(m is None for m in moments)
        if unseen:
            why = problems.get(name, "the calibration text did not reach it")
            which = f"{unseen} of {len(parts)} experts of {name}" if weight.ndim == 3 else name
            self.notes.append(f"{which}: rounded to the nearest, because {why}")
        results, error, norm = [], 0.0, 0.0
        for part, known in zip(parts, moments, strict=True):
            matrix = part.contiguous()
            made, values = self._rounded(name, matrix, known, scheme)
            if known is not None:
                difference = values - matrix
                error += float(((difference @ known.second) * difference).sum())
                norm += float(((matrix @ known.second) * matrix).sum())
            part.copy_(values)
            results.append(made)
        if norm > 0:
            self.errors[name] = (max(error, 0.0) / norm) ** 0.5
        quantized = stack(results) if weight.ndim == 3 else results[0]
        self.store.put(name, quantized, transposed=transposed)
