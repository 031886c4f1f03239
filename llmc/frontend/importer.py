"""torch.export graph -> Relax function, with weights as parameters that are never read.

Every node of an exported graph carries the shape and dtype that torch computed. The converters (import_ops.py) emit what
gives that type, and the importer compares each result with it, so that a converter which gets a dtype or broadcast wrong
fails here and not as a wrong number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch.export.graph_signature import InputKind
from tvm import relax, tirx

from llmc.errors import LlmcError
from llmc.frontend.graph import ParamInfo
from llmc.frontend.import_base import Complex, dtype_of, module_path
from llmc.frontend.import_ops import convert
from llmc.ir import Var, tensor_type
from llmc.passes.rewrite import Builder

TORCH_TO_TVM: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
    torch.float8_e4m3fn: "float8_e4m3fn",
}


_FOLDED = 2**20  # constants up to this many entries are computed while importing


@dataclass
class Imported:
    """The imported function before masks are resolved.

    Attributes:
        inputs: user inputs in the exported order.
        params: weights, in the exported order, and what they are called in the source model.
        builder: the bindings so far.
        outputs: Relax values of the exported outputs.
        origin: variable -> (module path, torch op) for messages.
        length: the symbolic sequence length T.
    """

    inputs: list[Var]
    params: list[tuple[Var, ParamInfo]]
    builder: Builder
    outputs: list[Any]
    origin: dict[Any, tuple[str, str]]
    length: Any


def live_nodes(graph: Any) -> set[Any]:
    """Nodes that the outputs depend on; assertions and dead code are left out."""
    live = {node for node in graph.nodes if node.op == "output"}
    for node in reversed(graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live


@dataclass
class Importer:
    """Imports one ExportedProgram.

    Args:
        program: the exported program; weights may be fake tensors.
        buffers: real values of buffers by their name in the program.
        prefix: name of the source model inside the exported module ("" if it is the module itself).
        parameter_buffers: buffers (names in the program) that are weights: parameters of the function, not constants.
        tied: other name of a weight -> the one that it goes by (names in the source model).
        limit: largest length that the model is made for.
    """

    program: Any
    buffers: Mapping[str, torch.Tensor]
    prefix: str = ""
    parameter_buffers: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    limit: int = 2**31 - 1
    length: Any = field(default_factory=lambda: tirx.Var("T", "int64"))

    def __post_init__(self) -> None:
        self.builder = Builder()
        self.env: dict[Any, Any] = {}
        self.origin: dict[Any, tuple[str, str]] = {}
        self.node: Any = None
        self._symbols: set[Any] = set()
        self._weights: dict[str, Var] = {}
        self.known: dict[Any, torch.Tensor] = {}

    # types and scalars

    def prim(self, value: Any) -> Any:
        """A torch size or scalar as int, float, bool, or a TIR expression in T."""
        if isinstance(value, torch.SymInt):
            return self._sympy(value.node.expr)
        return value

    def _sympy(self, expr: Any) -> Any:
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if expr in self._symbols:
            return self.length
        if isinstance(expr, sympy.Add | sympy.Mul):
            total = self._sympy(expr.args[0])
            for arg in expr.args[1:]:
                term = self._sympy(arg)
                total = total + term if isinstance(expr, sympy.Add) else total * term
            return total
        if type(expr).__name__ in ("FloorDiv", "PythonMod", "Mod"):
            a, b = (self._sympy(arg) for arg in expr.args)
            a, b = (tirx.IntImm("int64", x) if isinstance(x, int) else x for x in (a, b))
            return tirx.floordiv(a, b) if type(expr).__name__ == "FloorDiv" else tirx.floormod(a, b)
        if type(expr).__name__ in ("Max", "Min"):  # torch has its own
            return self._extreme(expr)
        if any(str(symbol).startswith("u") for symbol in expr.free_symbols):
            raise self.error(
                "a size or number that depends on the values of a tensor (how many tokens each expert gets, for example), "
                "while a graph has to hold for all values",
                "data-dependent",
            )
        raise self.error(f"a size {expr} that llmc cannot express in the sequence length")

    def _extreme(self, expr: Any) -> Any:
        """The argument that is the largest (smallest) for every length that the model is made for."""
        for arg in expr.args:
            rest = [arg - other if type(expr).__name__ == "Max" else other - arg for other in expr.args]
            # linear in the length, so that the ends decide
            linear = all(sympy.diff(difference, s, 2) == 0 for difference in rest for s in self._symbols)
            values = [d.subs(dict.fromkeys(self._symbols, n)) for d in rest for n in (1, self.limit)]
            if linear and all(value >= 0 for value in values):
                return self._sympy(arg)
        raise self.error(f"a size {expr} that llmc cannot express in the sequence length")

    def shape(self, value: Any) -> list[Any]:
        """Shape of a torch (fake) tensor with T."""
        return [self.prim(s) for s in value.shape]

    @staticmethod
    def dtype(value: torch.dtype) -> str:
        return TORCH_TO_TVM[value]

    # emitting

    def emit(self, expr: Any) -> Any:
        var = self.builder.emit(expr, self.node.name)
        self.origin[var] = (module_path(self.node, self.prefix), str(self.node.target))
        return var

    def constant(self, value: Any, dtype: str) -> Any:
        return relax.const(value, dtype)

    def error(self, what: str, ref: str = "unsupported-operation") -> LlmcError:
        """An error at the current node."""
        node = self.node
        where = module_path(node, self.prefix) or "the model"
        op = str(getattr(node, "target", node))
        return LlmcError(ref, f"{where} uses {op}: {what}.", context={"module": where, "op": op})

    # the program

    def run(self) -> Imported:
        signature = self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        inputs: list[Var] = []
        params: list[tuple[Var, ParamInfo]] = []
        outputs: list[Any] = []
        live = live_nodes(self.program.graph)
        for node in self.program.graph.nodes:
            self.node = node
            is_input = node.op == "placeholder" and specs[node.name].kind == InputKind.USER_INPUT
            if node not in live and not is_input:
                continue
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name], inputs, params)
            elif node.op == "call_function":
                if self._fold(node):
                    continue
                self.env[node] = self._convert(node)
                self._check(node)
            elif node.op == "output":
                outputs = [
                    self.env[n]
                    for n, spec in zip(node.args[0], signature.output_specs, strict=True)
                    if spec.kind.name == "USER_OUTPUT"
                ]
            else:
                raise self.error("a higher-order operation, which is not supported")
        return Imported(inputs, params, self.builder, outputs, self.origin, self.length)

    def _convert(self, node: Any) -> Any:
        try:
            return convert(self, node)
        except (
            ValueError,
            TypeError,
            KeyError,
        ) as error:  # what tvm raises for operands that it does not take
            reason = " ".join(str(error).split())[:200]
            raise self.error(f"a form of it that llmc cannot import ({reason})") from error

    def _placeholder(
        self, node: Any, spec: Any, inputs: list[Var], params: list[tuple[Var, ParamInfo]]
    ) -> None:
        value = node.meta["val"]
        if spec.kind == InputKind.USER_INPUT:
            for size in value.shape:
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self._symbols.add(size.node.expr)
            var = relax.Var(node.name, tensor_type(self.shape(value), self.dtype(value.dtype)))
            inputs.append(var)
            self.env[node] = var
        elif spec.kind == InputKind.PARAMETER or spec.target in self.parameter_buffers:
            name = spec.target[len(self.prefix) :].lstrip(".")
            name = self.tied.get(name, name)
            if name not in self._weights:
                var = relax.Var(
                    name.replace(".", "_"), tensor_type(self.shape(value), self.dtype(value.dtype))
                )
                self._weights[name] = var
                params.append((var, ParamInfo(name, tuple(value.shape), self.dtype(value.dtype))))
            self.env[node] = self._weights[name]
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            real = self.buffers.get(spec.target)
            if real is None:
                real = self.program.constants.get(spec.target)
            if real is None or real.device.type == "meta" or type(real).__name__ == "FakeTensor":
                raise LlmcError(
                    "buffer-without-value",
                    f"The model computes with the buffer {spec.target!r}, whose value is not known.",
                )
            self._set_known(node, real)
        else:
            raise LlmcError("unsupported-operation", f"Unexpected kind of graph input: {spec.kind}.")

    def _fold(self, node: Any) -> bool:
        """Compute a node with torch if everything that it reads is known; whether that was done."""
        value = node.meta.get("val")
        is_plain = isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape)
        if not is_plain or value.numel() > _FOLDED or getattr(node.target, "namespace", "") != "aten":
            return False
        inputs = node.all_input_nodes
        if any(n not in self.known for n in inputs):
            return False
        arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.known[n])
        if any(isinstance(x, torch.SymInt) for x in torch.utils._pytree.tree_leaves(arguments)):
            return False
        self._set_known(node, node.target(*arguments[0], **arguments[1]))
        return True

    def _set_known(self, node: Any, value: torch.Tensor) -> None:
        self.known[node] = value
        is_complex = value.is_complex()
        self.env[node] = (
            Complex(to_const(value.real), to_const(value.imag)) if is_complex else to_const(value)
        )

    def _check(self, node: Any) -> None:
        """The emitted type must be what torch computed."""
        value, got = node.meta.get("val"), self.env[node]
        if not isinstance(value, torch.Tensor) or isinstance(got, Complex):
            return
        want = self.dtype(value.dtype)
        if dtype_of(got) != want:
            raise self.error(f"imported as {got.ty.dtype} where torch has {want}", "importer-bug")
        if got.ty.shape is None and got.ty.ndim == value.dim():
            # lengths that Relax cannot prove equal (T and T - min(T, 1) + 1, say); torch has
            got = self.env[node] = self.emit(relax.op.reshape(got, relax.ShapeExpr(self.shape(value))))
        if got.ty.shape is None or len(got.ty.shape) != value.dim():
            raise self.error(
                f"imported with shape {got.ty.shape} where torch has {value.shape}", "importer-bug"
            )
        for mine, theirs in zip(got.ty.shape, value.shape, strict=True):
            if isinstance(mine, tirx.IntImm) and isinstance(theirs, int) and int(mine) != theirs:
                raise self.error(
                    f"imported with shape {got.ty.shape} where torch has {value.shape}", "importer-bug"
                )


def to_const(value: torch.Tensor) -> Any:
    """A small real tensor as a Relax constant."""
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return relax.const(value.float().numpy().astype(ml_dtypes.bfloat16), "bfloat16")
    return relax.const(np.array(value.numpy()), TORCH_TO_TVM[value.dtype])
