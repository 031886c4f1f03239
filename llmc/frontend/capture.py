"""capture: a model -> ModelGraph, with no code per model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
import tvm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from tvm import relax

from llmc.errors import LlmcError
from llmc.frontend.graph import ModelGraph, SourceModel
from llmc.frontend.import_ops import supported
from llmc.frontend.importer import Imported, Importer
from llmc.frontend.interfaces import routed_through_llmc
from llmc.frontend.positions import use_positions
from llmc.frontend.rope import original_frequencies
from llmc.frontend.tokens import TokenCheck
from llmc.frontend.trace_errors import check_range, refuse_recurrent, trace_error
from llmc.ir import tensor_type
from llmc.passes.raise_attention import RaiseAttention
from llmc.passes.rewrite import Builder

_TRACED_LENGTH = 24
_LARGE = 2**16  # a buffer of more entries is a weight, not a table to keep in the graph
NO_LIMIT = 2**31 - 1
_LIMIT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


class _OneSequence(torch.nn.Module):
    """The model as a function of one sequence: input_ids [1, T], positions [1, T] -> logits [1, T, V] (and taps)."""

    def __init__(self, model: torch.nn.Module, tapped: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self.model = model
        self._tapped = dict(tapped)
        self._arguments = set(inspect.signature(model.forward).parameters)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        taken: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)

        kwargs: dict[str, Any] = {}
        if "position_ids" in self._arguments or any(
            p.kind == p.VAR_KEYWORD for p in inspect.signature(self.model.forward).parameters.values()
        ):
            kwargs["position_ids"] = position_ids
        if "use_cache" in self._arguments:
            kwargs["use_cache"] = False
        with ExitStack() as stack:
            for module in self._tapped.values():
                handle = module.register_forward_hook(hook)
                stack.callback(handle.remove)
            output = self.model(input_ids, **kwargs)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple):
            logits = output[0]
        return (logits, *taken) if taken else logits


def capture(
    source: SourceModel | torch.nn.Module, *, taps: bool = False, max_seq_len: int | None = None
) -> ModelGraph:
    """Trace a decoder-only language model into a ModelGraph; weights are never read.

    Args:
        source: an opened model, or a module whose forward takes input_ids [1, T] (and position_ids [1, T]) and returns
            logits [1, T, V] or an object with ``.logits``. It is left as it was.
        taps: also return the output of every decoder layer.
        max_seq_len: longest sequence that the graph has to serve; None = what the model is made for. Some models
            compute differently beyond a length, and can be captured only below it.

    Raises:
        LlmcError: the model cannot be traced, uses an operation that llmc cannot import, has a mask that is not
            understood ("mask-not-understood"), or mixes tokens outside of attention ("token-mixing-not-captured").
    """
    if isinstance(source, SourceModel) and source.program is not None:
        return capture_exported(source.program, limit=min(max_seq_len or NO_LIMIT, source.max_seq_len))
    model = source if isinstance(source, torch.nn.Module) else source.module
    limit = length_limit(model) if isinstance(source, torch.nn.Module) else source.max_seq_len
    limit = min(limit, max_seq_len or NO_LIMIT)
    refuse_recurrent(model, decoder_layers(model))
    tapped = decoder_layers(model) if taps else {}
    wrapper = _OneSequence(model, tapped).eval()
    ids = torch.zeros(1, _TRACED_LENGTH, dtype=torch.long)
    positions = torch.arange(_TRACED_LENGTH)[None]
    dynamic = {1: torch.export.Dim.DYNAMIC}
    with original_frequencies(model, limit):
        with torch.no_grad(), routed_through_llmc(model), without_weights(model):
            try:
                with redirect_stderr(StringIO()):  # torch prints the whole graph when it fails
                    program = torch.export.export(
                        wrapper, (ids, positions), dynamic_shapes=(dynamic, dynamic), strict=False
                    )
            except LlmcError:
                raise
            except Exception as error:
                raise trace_error(model, error) from error
            program = _functional(program)
        buffers, weights = {}, []
        for name, buffer in model.named_buffers(remove_duplicate=False):
            if buffer.device.type == "meta" or _is_large_weight(model, name, buffer):
                weights.append(f"model.{name}")
            else:
                buffers[f"model.{name}"] = buffer
    check_range(program, limit)
    imported = Importer(
        program,
        buffers,
        "model",
        parameter_buffers=frozenset(weights),
        tied=tied_names(model),
        limit=limit,
    ).run()
    return _finish(imported, tuple(tapped), limit)


def capture_exported(program: torch.export.ExportedProgram, *, limit: int = NO_LIMIT) -> ModelGraph:
    """A ModelGraph of an exported program: input_ids i64[1, T] (and position_ids i64[1, T]) -> logits [1, T, V].

    T has to be dynamic. Attention may be scaled_dot_product_attention or spelled out; weights are the program's
    parameters and persistent buffers, other buffers become constants.

    Args:
        limit: largest length that the model is made for.

    Raises:
        LlmcError: as capture, and "exported-signature" if inputs or outputs are others.
    """
    program = _functional(program)
    signature = program.graph_signature
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    tokens = [values[name] for name in signature.user_inputs if isinstance(name, str)]
    if not 1 <= len(tokens) <= 2 or any(
        not isinstance(x, torch.Tensor) or x.dim() != 2 or not isinstance(x.shape[1], torch.SymInt)
        for x in tokens
    ):
        raise LlmcError(
            "exported-signature",
            f"The exported program has the inputs {[str(getattr(x, 'shape', x)) for x in tokens]}; llmc needs input_ids "
            "[1, T] and optionally position_ids [1, T], with a dynamic T.",
            hint="Export it with dynamic_shapes={'input_ids': {1: torch.export.Dim.DYNAMIC}}.",
        )
    persistent = {n for n, b in program.named_buffers() if n not in signature.non_persistent_buffers}
    weights = frozenset(n for n, b in program.named_buffers() if n in persistent and b.numel() > _LARGE)
    buffers = {n: b for n, b in program.named_buffers() if n not in weights}
    check_range(program, limit)
    imported = Importer(program, buffers, parameter_buffers=weights, limit=limit).run()
    return _finish(imported, (), limit)


def length_limit(model: torch.nn.Module) -> int:
    """Largest length that a module's config says it is made for."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(config, name, None) for name in _LIMIT_FIELDS)
    return next((int(x) for x in found if isinstance(x, int) and x > 0), NO_LIMIT)


def _is_large_weight(model: torch.nn.Module, name: str, buffer: torch.Tensor) -> bool:
    path, _, leaf = name.rpartition(".")
    persistent = leaf not in model.get_submodule(path)._non_persistent_buffers_set
    return persistent and buffer.is_floating_point() and buffer.numel() > _LARGE


@contextmanager
def without_weights(model: torch.nn.Module) -> Iterator[None]:
    """Replace parameters by fake ones on the CPU while tracing: no data, and no mixing of meta and CPU tensors."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    saved: list[tuple[dict[str, Any], str, Any]] = []
    fake: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or (table is module._buffers and value.device.type != "meta"):
                    continue
                if id(value) not in fake:
                    with mode:
                        empty = torch.empty(value.shape, dtype=value.dtype)
                    fake[id(value)] = (
                        torch.nn.Parameter(empty, requires_grad=False)
                        if table is module._parameters
                        else empty
                    )
                saved.append((table, name, value))
    # forward may set attributes (rotary embeddings cache frequencies) and buffers, which would be fake ones
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    try:
        for table, name, value in saved:
            table[name] = fake[id(value)]
        yield
    finally:
        for module, before, buffers in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
            module._buffers.clear()
            module._buffers.update(buffers)
        for table, name, value in saved:
            table[name] = value


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Name of every weight -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name)
        for table in (model.named_parameters, model.named_buffers)
        for name, value in table(remove_duplicate=False)
    }


def decoder_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The elements of the model's longest ModuleList, by name."""
    best: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > len(best):
            best = {f"{path}.{i}".lstrip("."): layer for i, layer in enumerate(module)}
    return best


def _functional(program: Any) -> Any:
    """Decompose what has no converter, and remove in-place operations; most graphs need neither."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.users]
    inplace = any(
        getattr(getattr(n.target, "_schema", None), "is_mutable", False)
        for n in program.graph.nodes
        if n.op == "call_function"
    )
    missing = {n.target for n in nodes if not supported(n)}
    if not inplace and not missing:
        return program
    table = {op: fn for op, fn in torch.export.default_decompositions().items() if op in missing}
    return program.run_decompositions(table)


def _finish(imported: Imported, taps: tuple[str, ...], limit: int) -> ModelGraph:
    """Resolve attention, check the tokens, and give main its final signature."""
    T = imported.length
    input_ids = relax.Var("input_ids", tensor_type([T], "int32"))
    positions = relax.Var("positions", tensor_type([T], "int32"))
    builder = Builder()
    for var, value in zip(imported.inputs, (input_ids, positions), strict=False):
        wide = builder.emit(relax.op.astype(value, "int64"), "wide")
        builder.bind(var, relax.op.reshape(wide, [1, T]))
    for binding in imported.builder.bindings:
        builder.keep(binding)
    outputs = []
    for output in imported.outputs:
        shape = list(output.ty.shape)
        outputs.append(builder.emit(relax.op.reshape(output, shape[1:]), "rows"))
    result = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
    params = [input_ids, positions, *(var for var, _ in imported.params)]
    module = tvm.IRModule({"main": builder.function(params, result, symbol="main")})
    where = _where(imported)
    module = RaiseAttention(where, positions, limit)(module)
    module = relax.transform.DeadCodeElimination(["main"])(module)
    module = use_positions(module, limit)
    TokenCheck(module, lambda var: imported.origin.get(var, ("", ""))).run()
    return ModelGraph(module, tuple(info for _, info in imported.params), int(outputs[0].ty.shape[-1]), taps)


def _where(imported: Imported) -> Any:
    def where(var: Any) -> str:
        path, op = imported.origin.get(var, ("", ""))
        return path or op or str(var)

    return where
