"""Rotation of the residual stream and of the heads' values, folded into the weights (QuaRot, SpinQuant).

QuaRot: Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant: Liu et al. 2024, arXiv 2405.16406. With an orthogonal R, the
model that has R folded into all that writes the residual stream and Rᵀ into all that reads it computes the same, for
RMSNorm without weights commutes with R; the norms' weights move into the matrices behind them first. Outliers of single
channels are spread over all of them, so that activations can be rounded to fewer bits. A second rotation, of each head's
values, goes into what makes the values and what reads them.

Nothing here knows an architecture. In every layer, what a norm feeds is found by leaving one channel of the norm open,
what writes the stream by leaving one output of one matrix open, and then the rotated layer is run on the rotated hidden
states: it must give the rotated output, or the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel
from llmc.quant.calibrate import LayerWork
from llmc.quant.fold import Fold, find_folds
from llmc.quant.orthogonal import Rotation, random_rotation
from llmc.quant.recorder import InputTap, Recorder, Usage
from llmc.quant.rotated import Change, RotatedWeights
from llmc.quant.runner import HeldLayer, LayerRunner
from llmc.quant.schemes import SCHEMES
from llmc.quant.stream import Norm, blocks_of, find_norms, head_changes, in_axis, inputs_of, out_axis

# of the largest hidden state or logit: float32 through a layer, and through the whole model
_LAYER_TOLERANCE, _MODEL_TOLERANCE = 1e-4, 1e-3
# of a head's values; heads that were mixed differ by more, even where attention is nearly uniform
_HEAD_TOLERANCE = 2e-5


def rotated(
    source: SourceModel, sequences: torch.Tensor, *, seed: int = 0
) -> tuple[SourceModel, Rotation, tuple[str, ...]]:
    """`source` with rotated weights, the rotation of its hidden states, and what was not rotated and why.

    Args:
        source: an opened model with weights; embedding and head must not be one tensor (llmc.frontend.untie).
        sequences: int64 [n, length]: tokens to try on; the beginning of the first is used.

    Raises:
        LlmcError: the model cannot be rotated exactly; says what stands against it.
    """
    assert source.weights is not None
    found = _Finder(source, LayerRunner(source, source.weights, sequences[:1]), seed).run()
    weights = RotatedWeights(source.weights, found.changes)
    result = replace(source, weights=weights)
    _check_whole(source, result, sequences)
    return result, found.stream, found.notes


@dataclass
class _Finder:
    source: SourceModel
    runner: LayerRunner
    seed: int
    changes: dict[str, Change] = field(default_factory=dict)
    without_heads: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not rotated, and why."""
        n = self.without_heads
        why = f"{n} of {len(self.runner.layers)} layers: no matrix makes values of heads alone; they are not rotated"
        return (why,) if n else ()

    def run(self) -> _Finder:
        self.runner.start()
        width = self.runner.probe_hidden().shape[-1]
        self.stream = random_rotation(width, self.seed, keep_mean=self._subtracts_mean())
        shared = self.runner.shared_names()
        self._start(self.runner.probe_hidden())
        for path in self.runner.layers:
            with self.runner.held(path) as layer:
                changes = _Layer(self, layer).changes()
                several = sorted(shared & set(changes))
                if several:
                    raise self.refusal(f"{several[0]} is used by more than one layer")
                self.changes.update(changes)
                self.runner.advance(layer)
        self._end(self.runner.probe_hidden())
        return self

    def refusal(self, why: str) -> LlmcError:
        return LlmcError(
            "cannot-rotate",
            f"{self.source.name} cannot be rotated exactly: {why}.",
            hint="Use another --quant-method, such as awq+gptq or smooth.",
        )

    def _subtracts_mean(self) -> bool:
        """Whether the first layer does the same when a constant is added to all channels: its norms subtract the mean."""
        path = self.runner.layers[0]
        hidden = self.runner.probe_hidden()
        with self.runner.held(path) as layer:
            shift = float(hidden.square().mean().sqrt())
            moved = self.runner.probe(layer, hidden=hidden + shift) - shift
            return _same(moved, self.runner.probe(layer), _LAYER_TOLERANCE)

    def _start(self, entering: torch.Tensor) -> None:
        """Embeddings, token and position: every table whose rows are as wide as the stream."""
        width = self.stream.width
        tables = {n for n in self.runner.outer_names() if self.runner.outer_shape(n)[1:] == (width,)}
        heads = set(self._head_usages()) & tables
        used = [n for n in sorted(tables) if n not in heads]
        if not used:
            raise self.refusal(
                "its embedding is also its output projection, and they would differ when rotated"
            )
        self.changes.update({n: Change(inputs=self.stream) for n in used})
        assert self.source.weights is not None
        weights = RotatedWeights(self.source.weights, self.changes)
        if not _same(self.runner.probe_start(weights), self.stream.apply(entering), _LAYER_TOLERANCE):
            raise self.refusal(f"what enters the first layer is more than a sum of rows of {', '.join(used)}")

    def _head_usages(self) -> dict[str, Usage]:
        """Matrices that the model multiplies with outside of its layers."""
        found: dict[str, Usage] = {}
        for name in sorted(self.runner.outer_names()):
            if len(self.runner.outer_shape(name)) != 2:
                continue
            tensors = {name: self.runner.load(name)}  # one at a time: they are the largest of the model
            recorder = Recorder(tensors)
            self.runner.probe_end(self.runner.probe_hidden(), tensors, recorder.watch)
            found.update(recorder.finish())
        return found

    def _end(self, leaving: torch.Tensor) -> None:
        """The last norm and the output projection."""
        width = self.stream.width
        usages = self._head_usages()
        vectors = [n for n in self.runner.outer_names() if self.runner.outer_shape(n) == (width,)]
        tensors = {n: self.runner.load(n) for n in [*usages, *vectors]}

        def run() -> dict[str, Usage]:
            recorder = Recorder({n: tensors[n] for n in usages})
            self.runner.probe_end(leaving, tensors, recorder.watch)
            return recorder.finish()

        before = self.runner.probe_end(leaving, tensors)
        changes = _norm_changes(self, find_norms(tensors, vectors, run), tensors, usages)
        readers = {n for n, u in usages.items() if inputs_of(tensors[n], u) == width}
        for name in readers - set(changes):  # no norm before it
            changes[name] = Change(inputs=self.stream, in_axis=in_axis(usages[name]))
        for name, change in changes.items():
            tensors[name] = change.apply(tensors[name])
        if not _same(self.runner.probe_end(self.stream.apply(leaving), tensors), before, _LAYER_TOLERANCE):
            raise self.refusal("what follows the last layer is more than a norm and an output projection")
        self.changes.update(changes)


@dataclass
class _Layer:
    """One decoder layer; its weights are as they were when `changes` returns."""

    finder: _Finder
    layer: HeldLayer

    def changes(self) -> dict[str, Change]:
        """Name -> change of all its parameters that are in or beside the stream."""
        finder, parameters = self.finder, self.layer.parameters
        width = finder.stream.width
        usages = self._usages()
        vectors = [n for n, p in parameters.items() if p.shape == (width,)]
        norms = find_norms(parameters, vectors, self._usages)
        changes = _norm_changes(finder, norms, parameters, usages)
        for name in self._writers(usages, changes):
            if name in usages:
                changes[name] = Change(outputs=finder.stream, out_axis=out_axis(usages[name]))
            else:
                changes[name] = Change(inputs=finder.stream)
        hidden = finder.runner.probe_hidden()
        want = finder.stream.apply(self._run())
        with self._kept(changes):
            for name, change in changes.items():
                parameters[name].copy_(change.apply(parameters[name]))
            got = self._run(finder.stream.apply(hidden))
        if not _same(got, want, _LAYER_TOLERANCE):
            raise finder.refusal(self._why(changes, norms))
        return self._with_heads(usages, changes)

    def _run(self, hidden: torch.Tensor | None = None) -> torch.Tensor:
        return self.finder.runner.probe(self.layer, hidden=hidden)

    def _usages(self) -> dict[str, Usage]:
        recorder = Recorder(self.layer.parameters)
        self.finder.runner.probe(self.layer, recorder.watch)
        return recorder.finish()

    @contextmanager
    def _kept(self, names: Mapping[str, object]) -> Iterator[None]:
        """The parameters get their values back afterwards."""
        saved = {n: self.layer.parameters[n].clone() for n in names}
        try:
            yield
        finally:
            for name, tensor in saved.items():
                self.layer.parameters[name].copy_(tensor)

    def _writers(self, usages: Mapping[str, Usage], known: Mapping[str, Change]) -> list[str]:
        """Matrices, biases and tables of biases whose output is added to the stream."""
        width = self.finder.stream.width
        parameters = self.layer.parameters
        candidates = []
        for name, tensor in parameters.items():
            axis = out_axis(usages[name]) if name in usages else -1
            if name not in known and tensor.is_floating_point() and tensor.shape[axis] == width:
                candidates.append((name, axis))
        found = []
        with self._kept(dict(candidates)):
            saved = {name: parameters[name].clone() for name, _ in candidates}
            for name, _ in candidates:
                parameters[name].zero_()
            base = self._run()
            channel = width // 3
            for name, axis in candidates:
                parameters[name].select(axis, channel).copy_(saved[name].select(axis, channel))
                moved = (self._run() - base).abs().flatten(0, -2).amax(dim=0)
                parameters[name].zero_()
                if float(moved[channel]) > 0 and int((moved > 0).sum()) == 1:
                    found.append(name)
        return found

    def _why(self, changes: Mapping[str, Change], norms: list[Norm]) -> str:
        """What stands against it, as far as that can be told."""
        path, width = self.layer.path, self.finder.stream.width

        def short(names: list[str]) -> str:
            return ", ".join(n.removeprefix(path + ".") for n in names)

        fed = {n for norm in norms for n in norm.consumers}
        bare = [
            n
            for n, p in self.layer.parameters.items()
            if p.shape == (width,) and n.endswith("weight") and n not in changes
        ]
        if bare:
            return f"in {path}, what {short(bare)} scales goes on to something other than linear layers"
        if not fed:
            return f"in {path}, no linear layer is fed by a norm of the residual stream"
        return f"{path} does more with the residual stream than norms, linear layers and additions"

    def _with_heads(self, usages: Mapping[str, Usage], changes: dict[str, Change]) -> dict[str, Change]:
        """Add the rotation of the values, where values are found that nothing but a matrix reads."""
        scheme = SCHEMES["q8"]
        plan = {n: scheme for n in usages if self.layer.parameters[n].ndim == 2}
        work = LayerWork(self.layer, plan, dict(usages), self.finder.runner)
        done = False
        for fold in find_folds(work):
            rotation = None if fold.producer.is_norm else self._head_rotation(fold, usages)
            if rotation is None:
                continue
            for name, change in head_changes(fold, rotation, usages).items():
                before = changes.get(name, Change())
                if change.outputs is None:
                    changes[name] = replace(before, inputs=rotation, in_axis=change.in_axis)
                else:
                    changes[name] = replace(before, outputs=rotation, out_axis=change.out_axis)
            done = True
        if not done:
            self.finder.without_heads += 1
        return changes

    def _head_rotation(self, fold: Fold, usages: Mapping[str, Usage]) -> Rotation | None:
        """A rotation of the largest blocks of the producer's channels that arrives at the consumers as it is."""
        reader = fold.consumers[0]
        before = self._inputs(reader)
        for block in blocks_of(fold):
            rotation = random_rotation(block, self.finder.seed + 1)
            changes = head_changes(fold, rotation, usages)
            producers = {n: c for n, c in changes.items() if n in fold.producer.names()}
            with self._kept(producers):
                for name, change in producers.items():
                    self.layer.parameters[name].copy_(change.apply(self.layer.parameters[name]))
                after = self._inputs(reader)
            if _same(after, rotation.apply(before), _HEAD_TOLERANCE):
                return rotation
        return None

    def _inputs(self, name: str) -> torch.Tensor:
        """Inputs [n, K] of a matrix, the first of its group."""
        tap = InputTap(self.layer.parameters)
        self.finder.runner.probe(self.layer, tap.watch)
        return tap.inputs[name]


def _norm_changes(
    finder: _Finder,
    norms: list[Norm],
    parameters: Mapping[str, torch.Tensor],
    usages: Mapping[str, Usage],
) -> dict[str, Change]:
    """Norms without weights, and the matrices behind them with these and rotated."""
    changes: dict[str, Change] = {}
    for norm in norms:
        factor = norm.factor(parameters)
        changes[norm.weight] = Change(constant=0.0 if norm.one_plus else 1.0)
        if norm.bias is not None:
            if float(factor.abs().min()) == 0:
                raise finder.refusal(f"{norm.weight} has zeros, so that {norm.bias} cannot be kept behind it")
            changes[norm.bias] = Change(scale=1 / factor, inputs=finder.stream)
        for name in norm.consumers:
            if name in changes:
                raise finder.refusal(f"{name} is fed by two norms")
            changes[name] = Change(scale=factor, inputs=finder.stream, in_axis=in_axis(usages[name]))
    return changes


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Equal up to `tolerance` of the largest element."""
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def _check_whole(source: SourceModel, made: SourceModel, sequences: torch.Tensor) -> None:
    """The logits must be those of the source.

    Raises:
        LlmcError: they are not: layers exchange more than their hidden states.
    """
    from llmc.reference import reference_logits

    ids = sequences[0, :64].tolist()
    want = torch.from_numpy(reference_logits(source, ids, "float32").logits)
    got = torch.from_numpy(reference_logits(made, ids, "float32").logits)
    if not _same(got, want, _MODEL_TOLERANCE):
        raise LlmcError(
            "cannot-rotate",
            f"{source.name} cannot be rotated exactly: its logits change by {float((got - want).abs().max()):.2g} of"
            f" {float(want.abs().max()):.2g}, so its layers exchange more than their hidden states.",
            hint="Use another --quant-method, such as awq+gptq or smooth.",
        )
