"""Products with a weight as torch's functions make them: watched from outside, and with their inputs rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmc.quant.schemes import Code, Scheme

_E4M3_MAX = 448.0

# function -> (argument that holds the input, the one that holds the weight, whether the weight is [out, in])
_PRODUCTS: dict[Callable[..., Any], tuple[int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, True),
    torch.matmul: (0, 1, False),
    torch.mm: (0, 1, False),
    torch.bmm: (0, 1, False),
    torch.addmm: (1, 2, False),
    torch.baddbmm: (1, 2, False),
    torch.Tensor.matmul: (0, 1, False),
    torch.Tensor.__matmul__: (0, 1, False),
    torch.Tensor.mm: (0, 1, False),
    torch.Tensor.bmm: (0, 1, False),
    torch.Tensor.addmm: (1, 2, False),
}


class Product:
    """One call of such a function.

    Attributes:
        x, weight: the factors.
        out_in: the weight is [out, in].
    """

    def __init__(
        self, places: tuple[int, int, bool], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._place, w, self.out_in = places
        self._args, self._kwargs = args, kwargs
        names = ("input", "weight" if self.out_in else "other")
        self.x: Any = args[self._place] if len(args) > self._place else kwargs.get(names[0])
        self.weight: Any = args[w] if len(args) > w else kwargs.get(names[1], kwargs.get("mat2"))

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
        """The product that a torch function computes; None if it is another function, or not of tensors."""
        places = _PRODUCTS.get(func)
        if places is None:
            return None
        product = Product(places, args, kwargs)
        tensors = isinstance(product.x, torch.Tensor) and isinstance(product.weight, torch.Tensor)
        return product if tensors else None

    def with_input(self, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another first factor."""
        if len(self._args) > self._place:
            return (*self._args[: self._place], x, *self._args[self._place + 1 :]), dict(self._kwargs)
        return self._args, {**self._kwargs, "input": x}


@dataclass(frozen=True, eq=False)
class InputRounding:
    """What happens to the inputs of a weight whose scheme rounds activations.

    Attributes:
        bits: of what they are rounded to.
        kept: int64 [M], the inputs that stay as they are and count for nothing else (outlier columns); None = none.
        code: INT, or E4M3 (then of 8 bits).
        group: neighbouring inputs that share a scale; 0 = all of a row.
    """

    bits: int = 8
    kept: torch.Tensor | None = None
    code: Code = Code.INT
    group: int = 0

    @staticmethod
    def of(scheme: Scheme, kept: torch.Tensor | None = None) -> InputRounding:
        """What a scheme that rounds activations does; `kept` are its outlier columns."""
        code = scheme.activations
        assert code is not None
        group = scheme.group_size if code is Code.E4M3 else 0
        return InputRounding(scheme.activation_bits, kept, code, group)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] rounded with one scale per row (or group): its largest magnitude / the largest number, as the kernels do."""
        if self.code is Code.E4M3:
            return self._to_floats(x)
        wide = x.float()
        if self.kept is not None:
            wide = wide.index_fill(-1, self.kept, 0)
        top = (1 << (self.bits - 1)) - 1
        most = wide.abs().amax(dim=-1, keepdim=True)
        inverse = torch.where(most > 1e-30, top / most, 0)
        rounded = (torch.round(wide * inverse) * (most / top)).to(x.dtype)
        if self.kept is not None:
            rounded[..., self.kept] = x[..., self.kept]
        return rounded

    def _to_floats(self, x: torch.Tensor) -> torch.Tensor:
        k = x.shape[-1]
        size = self.group or k
        wide = torch.nn.functional.pad(x.float(), (0, -k % size)).unflatten(-1, (-1, size))
        most = wide.abs().amax(dim=-1, keepdim=True)
        inverse = torch.where(most > 1e-30, _E4M3_MAX / most, 0)
        rounded = (wide * inverse).to(torch.float8_e4m3fn).float() * (most / _E4M3_MAX)
        return rounded.flatten(-2)[..., :k].to(x.dtype)


class RoundedInputs(TorchFunctionMode):
    """A context in which what is multiplied with some weights is rounded first.

    Args:
        rounding_of: tells from a weight (perhaps a view of a parameter) how its inputs are rounded; None = not at all.
        jitter: inputs are changed by up to this share of themselves before, at random but always the same.
    """

    def __init__(
        self, rounding_of: Callable[[torch.Tensor], InputRounding | None], jitter: float = 0.0
    ) -> None:
        super().__init__()
        self._rounding_of, self._jitter = rounding_of, jitter
        self._random = torch.Generator().manual_seed(0)

    @staticmethod
    def of(parameters: Mapping[str, torch.Tensor], roundings: Mapping[str, InputRounding]) -> RoundedInputs:
        """For weights by name; `parameters` are the tensors that the modules hold, each in a storage of its own."""
        known = {parameters[name].untyped_storage().data_ptr(): r for name, r in roundings.items()}
        return RoundedInputs(lambda weight: known.get(weight.untyped_storage().data_ptr()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs)
        rounding = None if product is None else self._rounding_of(product.weight)
        if product is None or rounding is None:
            return func(*args, **kwargs)
        x: torch.Tensor = product.x
        if self._jitter:
            noise = torch.rand(x.shape, generator=self._random) * 2 - 1
            x = x * (1 + self._jitter * noise).to(x.dtype)
        args, kwargs = product.with_input(rounding(x))
        return func(*args, **kwargs)
