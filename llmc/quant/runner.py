"""The source model run one decoder layer at a time over many sequences, with one layer's weights in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llmc.errors import LlmcError
from llmc.frontend.capture import decoder_layers
from llmc.frontend.graph import SourceModel, WeightSource
from llmc.reference import (
    _Buffers,
    _call,
    _Loader,
    _NoMeta,
    _runnable,
    _Slot,
    _slots,
    _Unit,
    _WeightNotThere,
)

TOKENS_PER_BATCH = 2048
PROBE_TOKENS = 64


@dataclass
class LayerCall:
    """The arguments that a decoder layer is called with for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None  # None: the hidden states are the first positional argument

    def run(self, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer."""
        if self.hidden_name is None:
            return first_of(layer(hidden, *self.args, **self.kwargs))
        return first_of(layer(*self.args, **{self.hidden_name: hidden}, **self.kwargs))


def first_of(out: Any) -> torch.Tensor:
    """The hidden states in what a decoder layer returns."""
    while not isinstance(out, torch.Tensor):
        out = out[0]
    return out


class HeldLayer:
    """A decoder layer whose weights are in memory, in float32, each in a storage of its own.

    Attributes:
        path: of the module.
        module: the layer.
        parameters: source name -> tensor; writing into one changes the layer.
    """

    def __init__(self, path: str, module: torch.nn.Module, loader: _Loader) -> None:
        self.path = path
        self.module = module
        self.parameters: dict[str, torch.Tensor] = {}
        self._slots = list(_slots(module, path, recurse=True))
        for slot in self._slots:
            name = loader.canonical(slot.name)
            if name not in self.parameters:
                tensor = loader.load(slot.name, slot.empty.dtype)
                self.parameters[name] = tensor.clone(memory_format=torch.contiguous_format)
            slot.put(self.parameters[name])

    def drop(self) -> None:
        for slot in self._slots:
            slot.put(slot.empty)
        self.parameters = {}


class LayerRunner:
    """Feeds sequences through a model layer by layer.

    Between layers only the hidden states of the sequences are kept (float32), and the other arguments of the
    layers (masks, rotary tables), equal ones once.

    Args:
        source: an opened model with weights; its module is not touched.
        weights: where to read from.
        sequences: int64 [n, length].

    Raises:
        LlmcError: the model has no weights or no stack of decoder layers.
    """

    def __init__(self, source: SourceModel, weights: WeightSource, sequences: torch.Tensor) -> None:
        if source.program is not None:
            raise LlmcError(
                "calibration-exported",
                f"{source.name} is an exported program, which cannot be run layer by layer for calibration.",
                hint="Calibrate the checkpoint or module that it was exported from.",
            )
        self._model = _runnable(source, "float32", None)
        self._source = source
        self._loader = _Loader(weights, source.module)
        self._layers = decoder_layers(self._model)
        if not self._layers:
            raise LlmcError(
                "calibration-no-layers",
                f"{source.name} has no list of decoder layers, so it cannot be calibrated layer by layer.",
                hint="Use a method without calibration.",
            )
        size = max(1, TOKENS_PER_BATCH // sequences.shape[1])
        self._batches = list(sequences.split(size))
        self._interned: list[torch.Tensor] = []
        self._tuples = False  # whether the layers return tuples
        self._hidden: list[torch.Tensor] = []
        self._calls: list[dict[str, LayerCall]] = []
        self._probe_calls: dict[str, LayerCall] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the decoder layers, in order."""
        return tuple(self._layers)

    @property
    def batches(self) -> int:
        return len(self._batches)

    def shared_names(self) -> set[str]:
        """Names of parameters that more than one decoder layer uses, or one and something outside of them."""
        count = Counter(self.outer_names())
        for path, layer in self._layers.items():
            count.update({self._loader.canonical(s.name) for s in _slots(layer, path, recurse=True)})
        return {name for name, n in count.items() if n > 1}

    def outer_names(self) -> set[str]:
        """Names of the parameters outside of the decoder layers."""
        return {self._loader.canonical(slot.name) for _, slots in self._outer_units() for slot in slots}

    def start(self) -> None:
        """Run what comes before the first layer, and learn how every layer is called."""
        try:
            whole = self._enter()
        except (IndexError, RuntimeError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            # the model takes the first element of what a layer returns, which was a row of a tensor
            self._tuples = True
            whole = self._enter()
        if not whole:
            raise LlmcError(
                "calibration-layers",
                f"The decoder layers of {type(self._model).__name__} do not pass one hidden state from each to the next,"
                " so it cannot be calibrated layer by layer.",
                hint="Use a method without calibration.",
            )

    def _enter(self) -> bool:
        """Whether what each layer got was of one shape, with the layers returning what ``_tuples`` says."""
        self._calls, self._hidden = [], []
        for ids in [self._batches[0][:1, :PROBE_TOKENS], *self._batches]:
            calls: dict[str, LayerCall] = {}
            entering: list[torch.Tensor] = []
            with self._bypassed(self._note(calls, entering)):
                out = self._whole(ids, {})
            if list(calls) != list(self._layers) or out.shape[:2] != ids.shape:
                return False
            if any(h.shape != entering[0].shape for h in entering):
                return False
            self._calls.append(calls)
            self._hidden.append(entering[0].clone())
        # the short one is for probes; decoders are causal, so its hidden states are a part of the first sequence's
        self._probe_calls = self._calls.pop(0)
        self._hidden.pop(0)
        return True

    @contextmanager
    def held(self, path: str) -> Iterator[HeldLayer]:
        """The layer with its weights in memory."""
        layer = HeldLayer(path, self._layers[path], self._loader)
        try:
            with torch.no_grad():
                yield layer
        finally:
            layer.drop()

    def feed(self, layer: HeldLayer, watch: Callable[[], Any]) -> None:
        """Run the layer on all batches inside `watch()`, keeping no output."""
        for hidden, calls in zip(self._hidden, self._calls, strict=True):
            with watch():
                calls[layer.path].run(layer.module, hidden)

    def probe(
        self, layer: HeldLayer, watch: Callable[[], Any] = nullcontext, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Output [1, n, d] of the layer for the beginning of the first sequence, or for other hidden states in it."""
        with watch():
            given = self.probe_hidden() if hidden is None else hidden
            return self._probe_calls[layer.path].run(layer.module, given)

    def probe_hidden(self) -> torch.Tensor:
        """Hidden states [1, n, d] that the layer of the moment gets at the beginning of the first sequence."""
        return self._hidden[0][:1, : min(PROBE_TOKENS, self._hidden[0].shape[1])]

    def probe_start(self, weights: WeightSource) -> torch.Tensor:
        """Hidden states [1, n, d] that the beginning of the first sequence enters the first layer with, with other weights."""
        entering: list[torch.Tensor] = []
        own = self._loader
        self._loader = _Loader(weights, self._source.module)
        try:
            with self._bypassed(self._note({}, entering)):
                self._whole(self._batches[0][:1, :PROBE_TOKENS], {})
        finally:
            self._loader = own
        return entering[0].clone()

    def probe_end(
        self,
        hidden: torch.Tensor,
        loaded: Mapping[str, torch.Tensor],
        watch: Callable[[], Any] = nullcontext,
    ) -> torch.Tensor:
        """Logits [1, n, V] of hidden states that leave the last layer; the parameters in `loaded` are those tensors."""
        last = list(self._layers)[-1]

        def replaced(path: str, given: torch.Tensor, call: LayerCall) -> torch.Tensor:
            return hidden if path == last else given

        with self._bypassed(replaced), watch():
            return self._whole(self._batches[0][:1, :PROBE_TOKENS], loaded)

    def outer_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        return self._loader.shape(name)

    def load(self, name: str) -> torch.Tensor:
        """A parameter in float32, a copy of its own."""
        return self._loader.load(name, torch.float32).clone()

    def advance(self, layer: HeldLayer, watch: Callable[[], Any] = nullcontext) -> None:
        """Replace the hidden states by the layer's outputs, computed inside `watch()`."""
        for i, calls in enumerate(self._calls):
            with watch():
                self._hidden[i] = calls[layer.path].run(layer.module, self._hidden[i]).clone()

    def finish(
        self, names: Iterable[str], watch: Callable[[Mapping[str, torch.Tensor]], AbstractContextManager[Any]]
    ) -> None:
        """Run what comes after the last layer inside ``watch(tensors)``; the parameters `names` are those tensors."""
        last = list(self._layers)[-1]
        loaded = {name: self._loader.load(name, torch.float32).clone() for name in names}
        for ids, hidden in zip(self._batches, self._hidden, strict=True):

            def replaced(
                path: str, given: torch.Tensor, call: LayerCall, hidden: Any = hidden
            ) -> torch.Tensor:
                return hidden if path == last else given

            with self._bypassed(replaced), watch(loaded):
                self._whole(ids, loaded)

    def _whole(self, ids: torch.Tensor, loaded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model; weights outside of the layers are read when they are needed, except those in `loaded`."""
        try:
            return self._streamed(ids, loaded)
        except _WeightNotThere:  # a weight that is read by another module than its own
            names = self.outer_names() - set(loaded)
            more = {name: self._loader.load(name, torch.float32) for name in names}
            return self._streamed(ids, {**more, **loaded})

    def _streamed(self, ids: torch.Tensor, loaded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with ExitStack() as stack, torch.no_grad(), _NoMeta():
            buffers = _Buffers()
            for module, slots in self._outer_units():
                there = [s for s in slots if self._loader.canonical(s.name) in loaded]
                for slot in there:
                    slot.put(loaded[self._loader.canonical(slot.name)])
                    stack.callback(slot.put, slot.empty)
                unit = _Unit(self._loader, [s for s in slots if s not in there], buffers)
                stack.callback(module.register_forward_pre_hook(unit.fill).remove)
                stack.callback(module.register_forward_hook(unit.drop, always_call=True).remove)
            return _call(self._model, ids)

    def _outer_units(self) -> list[tuple[torch.nn.Module, list[_Slot]]]:
        inner = {id(m) for layer in self._layers.values() for m in layer.modules()}
        units = []
        for path, module in self._model.named_modules():
            if id(module) in inner:
                continue
            slots = list(_slots(module, path, recurse=False))
            if slots:
                units.append((module, slots))
        return units

    def _note(
        self, calls: dict[str, LayerCall], entering: list[torch.Tensor]
    ) -> Callable[[str, torch.Tensor, LayerCall], torch.Tensor]:
        def note(path: str, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
            args, kwargs = self._intern(call.args), self._intern(call.kwargs)
            calls[path] = LayerCall(args, kwargs, call.hidden_name)
            entering.append(hidden)
            return hidden

        return note

    @contextmanager
    def _bypassed(self, instead: Callable[[str, torch.Tensor, LayerCall], torch.Tensor]) -> Iterator[None]:
        """Let the layers return what `instead` gives."""
        with ExitStack() as stack:
            for path, layer in self._layers.items():
                layer.forward = _Bypass(path, instead, self._tuples)
                stack.callback(layer.__dict__.pop, "forward")
            yield

    def _intern(self, value: Any) -> Any:
        """Equal tensors become one."""
        if isinstance(value, torch.Tensor):
            for known in self._interned[-32:]:
                if known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value):
                    return known
            self._interned.append(value.clone())
            return self._interned[-1]
        if isinstance(value, dict):
            return {k: self._intern(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._intern(v) for v in value)
        return value


class _Bypass:
    """The forward of a layer that is left out."""

    def __init__(
        self, path: str, instead: Callable[[str, torch.Tensor, LayerCall], torch.Tensor], as_tuple: bool
    ) -> None:
        self._path = path
        self._instead = instead
        self._as_tuple = as_tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden = self._instead(self._path, args[0], LayerCall(args[1:], kwargs, None))
        else:
            rest = dict(kwargs)
            given = rest.pop("hidden_states")
            hidden = self._instead(self._path, given, LayerCall((), rest, "hidden_states"))
        return (hidden, None, None) if self._as_tuple else hidden
