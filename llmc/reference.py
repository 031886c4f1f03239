"""The source model run by torch, layer by layer in bounded memory: what a compiled artifact is measured against."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from llmc.cache_rounding import round_cache
from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel, WeightSource
from llmc.frontend.meta import TORCH_DTYPES, from_config, skeleton
from llmc.products import InputRounding, RoundedInputs

# bytes of weights held at once: every weight is read once per run, so that little is gained by more
BUDGET = 256 << 20

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)


@dataclass(frozen=True)
class ReferenceResult:
    """What the source model computed for one sequence of n tokens.

    Attributes:
        logits: float32 [n, V].
        taps: module path -> output of that module, float32 [n, d].
        cache_rounded: keys and values were rounded as a cache would.
    """

    logits: np.ndarray
    taps: dict[str, np.ndarray] = field(default_factory=dict)
    cache_rounded: bool = False


def reference_logits(
    source: SourceModel,
    token_ids: Sequence[int],
    dtype: str,
    *,
    kv_dtype: str | None = None,
    taps: tuple[str, ...] = (),
    budget: int = BUDGET,
    jitter: float = 0.0,
) -> ReferenceResult:
    """Run the unmodified source model on one sequence with eager attention and eager experts.

    Weights are read when a module needs them and dropped afterwards; `source.module` itself is not touched. What is
    multiplied with the weights that ``source.weights.rounded_inputs`` names, if it has that, is rounded as it says.

    Args:
        source: an opened model with weights.
        token_ids: n tokens.
        dtype: float32, float16 or bfloat16: of weights and activations.
        kv_dtype: round keys and values to this dtype (of KV_DTYPES), as a cache would; None = do not. Has no effect on
            models that do not route attention through transformers' AttentionInterface.
        taps: modules whose outputs to keep.
        budget: bytes of weights to hold at once; a single module with more is held alone.
        jitter: change inputs that are rounded to int8 by up to this share of themselves before.

    Raises:
        LlmcError: the source has no weights, or a weight is damaged.
    """
    if source.weights is None:
        raise LlmcError(
            "no-weights", f"{source.name} was opened without weights; they are required to run it."
        )
    # A module whose weights are read by its parent, around its own forward, finds them missing;
    # larger pieces of the model are then held together.
    budgets = [budget, 16 * budget, 1 << 62]
    kv_dtype = kv_dtype if kv_dtype != dtype else None
    for last, size in zip((False, False, True), budgets, strict=True):
        model = _runnable(source, dtype, kv_dtype)
        before = EagerWithCache.of(kv_dtype).calls if kv_dtype else 0
        try:
            result = _run(model, source, token_ids, taps, size, jitter)
            called = bool(kv_dtype and EagerWithCache.of(kv_dtype).calls > before)
            return replace(result, cache_rounded=called)
        except _WeightNotThere:
            if last:
                raise
    raise AssertionError("unreachable")


def _runnable(source: SourceModel, dtype: str, kv_dtype: str | None) -> torch.nn.Module:
    """A private copy of the structure in `dtype`, parameters on meta.

    A model opened from a folder is built again, because some buffers (embedding scales) are rounded to the dtype
    that the model is built in.
    """
    if source.program is not None:
        return source.program.module()
    if source.folder is not None and isinstance(source.module, PreTrainedModel):
        model: torch.nn.Module = from_config(source.module.config, dtype, cls=type(source.module))
        if source.restructure is not None:
            source.restructure(model)
    else:
        model = skeleton(source.module, dtype)
    for config in _configs(model):
        config._attn_implementation = "eager" if kv_dtype is None else EagerWithCache.of(kv_dtype).name
        config._experts_implementation = "eager"
    return model


class EagerWithCache:
    """An attention implementation that rounds keys and values, then does what the model does eagerly.

    Attributes:
        name: under which transformers knows it.
        calls: so many times it was used.
    """

    _made: ClassVar[dict[str, EagerWithCache]] = {}

    def __init__(self, kv_dtype: str) -> None:
        self.name, self.calls, self._kv_dtype = f"llmc_eager_{kv_dtype}", 0, kv_dtype

    @staticmethod
    def of(kv_dtype: str) -> EagerWithCache:
        """The one for a type of pages."""
        made = EagerWithCache._made
        if kv_dtype not in made:
            made[kv_dtype] = EagerWithCache(kv_dtype)
            AttentionInterface.register(made[kv_dtype].name, made[kv_dtype])
            AttentionMaskInterface.register(made[kv_dtype].name, eager_mask)
        return made[kv_dtype]

    def __call__(
        self, module: torch.nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.calls += 1
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        key, value = (round_cache(x, self._kv_dtype) for x in (key, value))
        return eager(module, query, key, value, *args, **kwargs)


def _configs(model: torch.nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in seen:
            seen.add(id(config))
            yield config


def _run(
    model: torch.nn.Module,
    source: SourceModel,
    token_ids: Sequence[int],
    taps: tuple[str, ...],
    budget: int,
    jitter: float,
) -> ReferenceResult:
    assert source.weights is not None
    tapped: dict[str, np.ndarray] = {}
    with ExitStack() as stack, torch.no_grad(), _NoMeta():
        loader, buffers = _Loader(source.weights, source.module), _Buffers()
        for module, tensors in _units(model, "", budget):
            unit = _Unit(loader, tensors, buffers)
            stack.callback(module.register_forward_pre_hook(unit.fill).remove)
            stack.callback(module.register_forward_hook(unit.drop, always_call=True).remove)
        if loader.rounded_inputs:
            stack.enter_context(RoundedInputs(loader.input_rounding, jitter))
        for path in taps:
            stack.callback(model.get_submodule(path).register_forward_hook(_tap(tapped, path)).remove)
        logits = _call(model, torch.tensor([list(token_ids)], dtype=torch.long))
    return ReferenceResult(logits[0].float().numpy(), tapped)


def _call(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, n, V] of a transformers model or of any module from tokens (and positions) to logits."""
    if isinstance(model, torch.fx.GraphModule):
        return _logits_of(model(ids, torch.arange(ids.shape[1])[None]) if _inputs(model) > 1 else model(ids))
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "use_cache" in known:
        extra["use_cache"] = False
    if "return_dict" in known:
        extra["return_dict"] = True
    if not isinstance(model, PreTrainedModel):
        for name in ("position_ids", "positions"):
            if name in known:
                extra[name] = torch.arange(ids.shape[1])[None]
    return _logits_of(model(ids, **extra))


def _inputs(model: torch.fx.GraphModule) -> int:
    return sum(node.op == "placeholder" for node in model.graph.nodes)


def _logits_of(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    logits = getattr(out, "logits", None)
    return logits if logits is not None else out[0]


def _tap(tapped: dict[str, np.ndarray], path: str) -> Any:
    def hook(module: torch.nn.Module, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        tapped[path] = hidden.detach().float().reshape(-1, hidden.shape[-1]).numpy().copy()

    return hook


@dataclass(frozen=True, eq=False)
class _Slot:
    """A weight on the meta device: where it belongs and what it is called in the source model."""

    owner: torch.nn.Module
    leaf: str
    name: str
    empty: torch.Tensor

    def put(self, value: torch.Tensor) -> None:
        if self.leaf in self.owner._parameters:
            self.owner._parameters[self.leaf] = (
                value
                if isinstance(value, torch.nn.Parameter)
                else torch.nn.Parameter(value, requires_grad=False)
            )
        else:
            self.owner._buffers[self.leaf] = value


class _WeightNotThere(RuntimeError):
    """An operation was given a weight that is not materialised."""


class _NoMeta(TorchDispatchMode):
    """Refuses meta tensors: some of torch's CPU operators (addmm) take them and return garbage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in [*args, *(kwargs or {}).values()]:
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, torch.Tensor) and item.device.type == "meta":
                    raise _WeightNotThere(str(func))
        return func(*args, **(kwargs or {}))


class _Loader:
    """Reads weights by any of their names; tied ones are recognised as one."""

    def __init__(self, weights: WeightSource, module: torch.nn.Module) -> None:
        self._weights = weights
        self.rounded_inputs: Mapping[str, InputRounding] = getattr(weights, "rounded_inputs", {})
        self._held: dict[int, InputRounding] = {}  # by storage, of those of them that are in use
        first: dict[int, str] = {}
        self._canonical = {
            name: first.setdefault(id(tensor), name)
            for name, tensor in module.named_parameters(remove_duplicate=False)
        }

    def canonical(self, name: str) -> str:
        return self._canonical.get(name, name)

    def converts(self, name: str, dtype: torch.dtype) -> bool:
        """Whether load() makes a copy of its own, which nobody else sees."""
        stored = self._weights.info(self.canonical(name)).dtype
        return stored != str(dtype).removeprefix("torch.") and stored in TORCH_DTYPES

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.info(self.canonical(name)).shape

    def hold(self, name: str, tensor: torch.Tensor, held: bool) -> None:
        """Note that a weight is in use from now on, or no more."""
        rounding = self.rounded_inputs.get(self.canonical(name))
        if rounding is None:
            return
        storage = tensor.untyped_storage().data_ptr()
        if held:
            self._held[storage] = rounding
        else:
            self._held.pop(storage, None)

    def input_rounding(self, weight: torch.Tensor) -> InputRounding | None:
        """How inputs of this weight, or view of one, are rounded."""
        return self._held.get(weight.untyped_storage().data_ptr())

    def load(self, name: str, dtype: torch.dtype, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in `dtype`, in `buffer` if that fits and a conversion is needed."""
        tensor = self._weights.load(self.canonical(name))
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if buffer is not None and buffer.dtype == dtype and buffer.shape == tensor.shape:
            return buffer.copy_(tensor)
        return tensor.to(dtype)


class _Buffers:
    """Converted weights of the unit before, to convert into: fresh memory costs more than the conversion itself."""

    _WORTH = 1 << 20  # elements

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def take(self, slots: Iterable[_Slot]) -> dict[_Slot, torch.Tensor]:
        """Buffers for these weights; what fits none of them is let go, so that no more than one unit is held."""
        out = {}
        for slot in slots:
            same = self._free.get(tuple(slot.empty.shape))
            if same:
                out[slot] = same.pop()
        self._free.clear()
        return out

    def give(self, slots: Mapping[_Slot, torch.Tensor], out: Any) -> None:
        """Keep the converted weights, unless the module may have returned a view of one."""
        alias = {t.untyped_storage().data_ptr() for t in _tensors(out)}
        for slot, tensor in slots.items():
            big = tensor.numel() >= self._WORTH and not isinstance(slot.owner, torch.nn.Embedding)
            if big and tensor.untyped_storage().data_ptr() not in alias:
                self._free.setdefault(tuple(tensor.shape), []).append(tensor)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class _Unit:
    """Weights that are held while one module runs."""

    def __init__(self, loader: _Loader, slots: Iterable[_Slot], buffers: _Buffers) -> None:
        self._loader = loader
        self._slots = tuple(slots)
        self._buffers = buffers
        self._converted: dict[_Slot, torch.Tensor] = {}
        self._filled: list[tuple[str, torch.Tensor]] = []

    def fill(self, module: torch.nn.Module, args: Any) -> None:
        buffers = self._buffers.take(self._slots)
        loaded: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        for slot in self._slots:
            key = (self._loader.canonical(slot.name), slot.empty.dtype)
            if key not in loaded:
                loaded[key] = self._loader.load(slot.name, slot.empty.dtype, buffers.get(slot))
                if self._loader.converts(slot.name, slot.empty.dtype):
                    self._converted[slot] = loaded[key]
            slot.put(loaded[key])
            self._loader.hold(slot.name, loaded[key], True)
            self._filled.append((slot.name, loaded[key]))

    def drop(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        for slot in self._slots:
            slot.put(slot.empty)
        for name, tensor in self._filled:
            self._loader.hold(name, tensor, False)
        self._filled = []
        self._buffers.give(self._converted, out)
        self._converted = {}


def _units(module: torch.nn.Module, path: str, budget: int) -> Iterator[tuple[torch.nn.Module, list[_Slot]]]:
    """Cut the model into modules whose weights fit the budget together; what does not fit is cut at its children."""
    everything = list(_slots(module, path, recurse=True))
    if not everything:
        return
    fits = sum(math.prod(s.empty.shape) * s.empty.element_size() for s in everything) <= budget
    if fits and not isinstance(module, _CONTAINERS):
        yield module, everything
        return
    own = list(_slots(module, path, recurse=False))
    for name, child in module.named_children():
        child_path = f"{path}.{name}".lstrip(".")
        if isinstance(child, (torch.nn.ParameterList, torch.nn.ParameterDict)):
            own += _slots(child, child_path, recurse=True)  # nobody calls them: they belong to their parent
        else:
            yield from _units(child, child_path, budget)
    if own:
        yield module, own


def _slots(module: torch.nn.Module, path: str, *, recurse: bool) -> Iterator[_Slot]:
    parts = module.named_modules(prefix=path) if recurse else [(path, module)]
    for name, part in parts:
        for leaf, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and tensor.device.type == "meta":
                yield _Slot(part, leaf, f"{name}.{leaf}".lstrip("."), tensor)
