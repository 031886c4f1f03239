"""Products with a weight as torch's functions make them: watched from outside, and with their inputs rounded to int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] rounded to int8 with one scale per row (largest magnitude / 127), as the integer kernels do it."""
    wide = x.float()
    most = wide.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(most > 1e-30, 127 / most, 0)
    return (torch.round(wide * inverse) * (most / 127)).to(x.dtype)


class RoundedInputs(TorchFunctionMode):
    """A context in which what is multiplied with some weights is rounded to int8 per row first.

    Args:
        is_rounded: tells from a weight (perhaps a view of a parameter) whether its inputs are.
        jitter: inputs are changed by up to this share of themselves before, at random but always the same.
    """

    def __init__(self, is_rounded: Callable[[torch.Tensor], bool], jitter: float = 0.0) -> None:
        super().__init__()
        self._is_rounded, self._jitter = is_rounded, jitter
        self._random = torch.Generator().manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs)
        if product is None or not self._is_rounded(product.weight):
            return func(*args, **kwargs)
        x: torch.Tensor = product.x
        if self._jitter:
            noise = torch.rand(x.shape, generator=self._random) * 2 - 1
            x = x * (1 + self._jitter * noise).to(x.dtype)
        args, kwargs = product.with_input(to_int8(x))
        return func(*args, **kwargs)
