"""How much each weight of a model suffers from quantization, measured by running the source model under torch.

One weight at a time is replaced by what a scheme makes of it, and the KL divergence of the model's predictions from the
unchanged model's is taken on one window of text: for a text that the model predicts well this is the growth of the
mean loss, but far less noisy. It is quadratic in the weight's error, so that one run per weight does: the other schemes'
losses follow from their errors. Schemes with int8 activations take one more run, in w8a8: what that loses beyond the
error of its weights is what rounding the weight's inputs costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmc.evaluate import Floats, Window, evaluate
from llmc.frontend.graph import ParamInfo, SourceModel, WeightSource
from llmc.products import InputRounding
from llmc.quant.auto import Assignment, Candidate
from llmc.quant.quantizer import RoundToNearest, WeightQuantizer
from llmc.quant.schemes import NONE, SCHEMES, Scheme
from llmc.reference import reference_logits

Progress = Callable[[float, float, str], None]

# bytes of dequantized weights that are kept between windows
_KEPT = 2 << 30
# narrower weights gain nothing
_NARROW = 32
# the scheme in which the rounding of activations is measured: its weights lose next to nothing
INT8_PROBE = "w8a8"
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class Quantizable:
    """A weight that a scheme may be chosen for.

    Attributes:
        name: of the parameter in the source model.
        shape: (out, in), or (experts, out, in), as the quantizer takes it.
        transposed: the checkpoint stores the last two axes the other way round.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    def nbytes(self, scheme: Scheme | None, dtype: str) -> int:
        """Size of the weight in a scheme, or in the model's dtype."""
        bits = _BITS[dtype] if scheme is None else scheme.bits_per_weight(self.shape[-1])
        return math.ceil(math.prod(self.shape) * bits / 8)


def quantizables(source: SourceModel) -> list[Quantizable]:
    """Weights of linear layers and experts, tied ones once under their first name; no routers, nothing narrow."""
    first: dict[int, str] = {}
    for name, parameter in source.module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    experts = {p.shape[0] for p in source.module.parameters() if p.ndim == 3}
    found: dict[str, Quantizable] = {}
    for module in source.module.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            stacked = parameter.ndim == 3
            linear = leaf == "weight" and (
                isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
            )
            if not (stacked or linear):
                continue
            transposed = bool(getattr(module, "is_transposed", False)) if stacked else _stored_in_out(module)
            if min(parameter.shape[-2:]) < _NARROW or (linear and experts & set(parameter.shape)):
                continue
            *lead, a, b = parameter.shape
            shape = (*lead, b, a) if transposed else (*lead, a, b)
            name = first[id(parameter)]
            found.setdefault(name, Quantizable(name, shape, transposed))
    return list(found.values())


def _stored_in_out(module: torch.nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


class Sensitivity:
    """Measures what quantization does to a source model on a text.

    Args:
        source: the opened model with its weights.
        windows: the text on which whole assignments are measured.
        probe: the text on which single weights are measured; default: the first window.
        dtype: of the weights that stay as they are, for their size; default: the checkpoint's.
        quantizer: the method; default round to nearest.
        progress: told (done, total, what) while weights are measured.
    """

    def __init__(
        self,
        source: SourceModel,
        windows: Sequence[Window],
        *,
        probe: Window | None = None,
        dtype: str | None = None,
        quantizer: WeightQuantizer | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.weights = {weight.name: weight for weight in quantizables(source)}
        self._source = source
        self._windows = list(windows)
        self._probe = probe or self._windows[0]
        self._dtype = dtype or source.dtype
        self._quantizer = quantizer or RoundToNearest()
        self._progress = progress or (lambda done, total, what: None)
        self._exact_loss: float | None = None

    def candidates(self, schemes: Sequence[str], probe: str) -> dict[str, list[Candidate]]:
        """Size and predicted loss of each weight in each scheme ("none" = as it is).

        Args:
            probe: the scheme in which each weight is measured.
        """
        window = [self._probe]
        exact = self._logits({})(self._probe.ids)
        out: dict[str, list[Candidate]] = {}
        for i, (name, weight) in enumerate(self.weights.items()):
            self._progress(i, len(self.weights), name)
            result = evaluate(self._logits({name: probe}), window, against=lambda ids: exact).against
            assert result is not None
            values = self._load(weight)
            unit = result.kl_mean / (self._error(weight, values, SCHEMES[probe]) or 1.0)
            rounds = any(c != NONE and SCHEMES[c].activation_bits for c in schemes)
            inputs = self._loss_of_inputs(weight, values, unit, exact) if rounds else 0.0
            out[name] = []
            for choice in schemes:
                scheme = None if choice == NONE else SCHEMES[choice]
                error = 0.0 if scheme is None else self._error(weight, values, scheme)
                loss = unit * error + (inputs if scheme is not None and scheme.activation_bits else 0.0)
                out[name].append(Candidate(choice, weight.nbytes(scheme, self._dtype), loss))
        return out

    def _loss_of_inputs(self, weight: Quantizable, values: np.ndarray, unit: float, exact: Floats) -> float:
        """What rounding a weight's inputs to int8 costs, nats; `unit` is the loss per squared error of the weight."""
        logits = self._logits({weight.name: INT8_PROBE})
        result = evaluate(logits, [self._probe], against=lambda ids: exact).against
        assert result is not None
        return max(0.0, result.kl_mean - unit * self._error(weight, values, SCHEMES[INT8_PROBE]))

    def loss(self, assignment: Assignment) -> float:
        """Growth of the mean loss (nats per token) over the unchanged model on the whole text."""
        if self._exact_loss is None:
            self._exact_loss = self._mean_loss({})
        return self._mean_loss(assignment) - self._exact_loss

    def _mean_loss(self, assignment: Assignment) -> float:
        return math.log(evaluate(self._logits(assignment), self._windows).perplexity)

    def _logits(self, assignment: Assignment) -> Callable[[Sequence[int]], Floats]:
        assert self._source.weights is not None
        chosen = {
            name: (self.weights[name], SCHEMES[scheme])
            for name, scheme in assignment.items()
            if scheme != NONE
        }
        changed = dataclasses.replace(
            self._source, weights=_Dequantized(self._source.weights, chosen, self._quantizer)
        )
        return lambda ids: reference_logits(changed, ids, "float32").logits

    def _load(self, weight: Quantizable) -> np.ndarray:
        assert self._source.weights is not None
        return _as_matrix(self._source.weights.load(weight.name), weight)

    def _error(self, weight: Quantizable, values: np.ndarray, scheme: Scheme) -> float:
        made = self._quantizer.quantize(weight.name, values, scheme).dequantize()
        difference = (made - values).ravel()
        return float(np.dot(difference, difference))


class _Dequantized:
    """The source's weights, some of them replaced by what their quantized form stands for.

    Attributes:
        rounded_inputs: those whose scheme rounds activations too, for llmc.reference.
    """

    def __init__(
        self,
        weights: WeightSource,
        chosen: Mapping[str, tuple[Quantizable, Scheme]],
        quantizer: WeightQuantizer,
    ) -> None:
        self._weights = weights
        self._chosen = chosen
        self.rounded_inputs = {
            name: InputRounding.of(scheme) for name, (_, scheme) in chosen.items() if scheme.activation_bits
        }
        self._quantizer = quantizer
        self._kept: dict[str, torch.Tensor] = {}
        self._room = _KEPT

    def names(self) -> tuple[str, ...]:
        return self._weights.names()

    def info(self, name: str) -> ParamInfo:
        info = self._weights.info(name)
        return dataclasses.replace(info, dtype="float32") if name in self._chosen else info

    def load(self, name: str) -> torch.Tensor:
        if name not in self._chosen:
            return self._weights.load(name)
        if name in self._kept:
            return self._kept[name]
        weight, scheme = self._chosen[name]
        values = _as_matrix(self._weights.load(name), weight)
        made = torch.from_numpy(self._quantizer.quantize(name, values, scheme).dequantize())
        if weight.transposed:
            made = made.transpose(-1, -2).contiguous()
        if made.nbytes <= self._room:
            self._room -= made.nbytes
            self._kept[name] = made
        return made


def _as_matrix(tensor: Any, weight: Quantizable) -> np.ndarray:
    """float32 in the shape that the quantizer takes."""
    tensor = tensor.detach().float()
    if weight.transposed:
        tensor = tensor.transpose(-1, -2)
    array: np.ndarray = tensor.contiguous().numpy()
    return array
