"""Statistics of what every weight matrix is multiplied with, taken from outside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmc.products import Product


@dataclass
class Moments:
    """Statistics of inputs x of width K.

    Attributes:
        rows: how many there were.
        second: float32 [K, K], sum of x xᵀ.
        magnitude: float32 [K], sum of |x|.
        peak: float32 [K], largest |x|.
    """

    rows: int
    second: torch.Tensor
    magnitude: torch.Tensor
    peak: torch.Tensor

    @staticmethod
    def zero(width: int) -> Moments:
        return Moments(0, torch.zeros(width, width), torch.zeros(width), torch.zeros(width))

    def add(self, x: torch.Tensor) -> None:
        """x: [n, K]."""
        if len(x) == 0:
            return
        x = x.float()
        self.rows += len(x)
        self.second.addmm_(x.T, x)
        magnitude = x.abs()
        self.magnitude += magnitude.sum(dim=0)
        self.peak = torch.maximum(self.peak, magnitude.amax(dim=0))

    def scaled(self, factor: torch.Tensor) -> Moments:
        """Of inputs that are multiplied by `factor` [K], which is not negative."""
        second = self.second * factor[:, None] * factor[None]
        return Moments(self.rows, second, self.magnitude * factor, self.peak * factor)


@dataclass
class Usage:
    """How a parameter was used.

    Attributes:
        transposed: it is stored [..., in, out].
        moments: of its inputs, one entry per expert (one entry for a matrix).
        group: parameters with the same group number always have the very same input.
    """

    transposed: bool
    moments: list[Moments | None]
    group: int


@dataclass
class _Shared:
    """Parameters that are multiplied with one input tensor; the first of them collects."""

    number: int
    leader: str
    pass_no: int


@dataclass
class Recorder:
    """Collects Moments for parameters whose values are in memory.

    Args:
        parameters: name -> the tensor that the modules hold now; each in a storage of its own.
    """

    parameters: Mapping[str, torch.Tensor]
    usages: dict[str, Usage] = field(default_factory=dict)
    # name -> why there are no statistics
    problems: dict[str, str] = field(default_factory=dict)
    _groups: dict[str, _Shared] = field(default_factory=dict)
    _pass: int = 0

    def __post_init__(self) -> None:
        self._by_storage = {
            t.untyped_storage().data_ptr(): name for name, t in self.parameters.items() if t.ndim in (2, 3)
        }

    def watch(self) -> TorchFunctionMode:
        """A context in which one batch is run."""
        self._pass += 1
        return _Watch(self)

    def see(self, x: torch.Tensor, weight: torch.Tensor, out_in: bool, alive: dict[int, Any]) -> None:
        """A product of x with a weight, which may be a view of a parameter."""
        name = self._by_storage.get(weight.untyped_storage().data_ptr())
        if name is None or name in self.problems:
            return
        parameter = self.parameters[name]
        if weight.ndim < 2 or weight.shape[-1] == 1:
            self.problems[name] = "it is used as a vector"
            return
        in_axis = -1 if out_in else -2
        transposed = weight.stride(in_axis) != parameter.stride(-1)
        whole = weight.numel() == parameter.numel()
        per_expert = parameter.numel() // len(parameter) if parameter.ndim == 3 else 0
        if not whole and weight.numel() != per_expert:
            self.problems[name] = "only parts of it are used at a time"
            return
        width = parameter.shape[-2 if transposed else -1]
        if weight.shape[in_axis] != width or (parameter.ndim == 2 and x.ndim < 1):
            self.problems[name] = "it is reshaped before it is used"
            return
        experts = len(parameter) if parameter.ndim == 3 else 1
        usage = self.usages.get(name)
        if usage is None:
            group = self._group_of(name, x, parameter.ndim == 3, alive)
            usage = self.usages[name] = Usage(transposed, [None] * experts, group)
        elif usage.transposed != transposed:
            self.problems[name] = "it is used both as it is and transposed"
            return
        if parameter.ndim == 3 and whole:
            if x.ndim != 3 or len(x) != experts:
                self.problems[name] = "all experts are multiplied with one input"
                return
            for e in range(experts):
                self._add(name, usage, e, x[e])
            return
        expert = weight.storage_offset() // per_expert if parameter.ndim == 3 else 0
        shared = self._groups.get(name)
        if shared is None or shared.leader == name:
            self._add(name, usage, expert, x)

    def _group_of(self, name: str, x: torch.Tensor, expert: bool, alive: dict[int, Any]) -> int:
        """The group of a parameter that is seen for the first time."""
        key = id(x)
        known = alive.get(key)
        if known is not None and not expert and known[1].pass_no == self._pass:
            shared: _Shared = known[1]
        else:
            shared = _Shared(len(self.usages), name, self._pass)
            if not expert:
                alive[key] = (x, shared)
        if not expert:
            self._groups[name] = shared
        return shared.number

    def _add(self, name: str, usage: Usage, expert: int, x: torch.Tensor) -> None:
        moments = usage.moments[expert]
        if moments is None:
            moments = usage.moments[expert] = Moments.zero(x.shape[-1])
        moments.add(x.detach().reshape(-1, x.shape[-1]))

    def finish(self) -> dict[str, Usage]:
        """What was found; members of a group share the Moments of the one that collected."""
        for name, shared in self._groups.items():
            if shared.leader != name and name in self.usages:
                self.usages[name].moments = self.usages[shared.leader].moments
        return {n: u for n, u in self.usages.items() if n not in self.problems}


class InputTap(Recorder):
    """Keeps the inputs themselves, of one batch.

    Attributes:
        inputs: name of the first parameter of a group -> its input.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__(parameters)
        self.inputs: dict[str, torch.Tensor] = {}

    def _add(self, name: str, usage: Usage, expert: int, x: torch.Tensor) -> None:
        if self.parameters[name].ndim == 2:
            self.inputs[name] = x.detach().reshape(-1, x.shape[-1]).clone()


class _Watch(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        # id of an input tensor -> (the tensor, kept so that the id stays its own, its group)
        self._alive: dict[int, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs)
        if product is not None:
            self._recorder.see(product.x, product.weight, product.out_in, self._alive)
        return func(*args, **kwargs)
