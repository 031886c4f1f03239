"""What a matmul kernel does to its sums before it stores them: bias, activation, gate, residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules import vmath


@dataclass(frozen=True)
class Epilogue:
    """y[row, column] = f(sum) (+ residual[row, column]), as LinearAttrs (llmc/ops.py) says.

    Attributes:
        n: columns of y.
        n_block: sums per weight block.
        activation: a key of FUNCTIONS, or "".
        gated: half of a block's sums are gates of the other half.
        gate_second: the gates are the second half of a block, and of the bias.
        in_dtype: of bias and residual.
        out_dtype: of y.
        row_stride: elements of y, and of the residual, from one row to the next; 0 = n.
    """

    n: int
    n_block: int
    in_dtype: str
    out_dtype: str
    activation: str = ""
    gated: bool = False
    gate_second: bool = False
    row_stride: int = 0

    @property
    def stride(self) -> int:
        """row_stride, or its default."""
        return self.row_stride or self.n

    @property
    def columns(self) -> int:
        """Columns of y per weight block."""
        return self.n_block // 2 if self.gated else self.n_block

    def store_held(
        self,
        held: list[list[Any]],
        rows: list[Any],
        block: Any,
        y: Any,
        caps: Capabilities,
        bias: Any = None,
        residual: Any = None,
        bias_base: Any = 0,
    ) -> None:
        """store() of sums in registers: a vector for each row and part of the block."""
        self.store(
            lambda r, v: e.load(held[r][v], 0, caps.lanes_f32),
            lambda r, v, i: held[r][v][i],
            rows,
            block,
            y,
            caps,
            bias,
            residual,
            bias_base,
        )

    def store(
        self,
        sums: Callable[[int, int], Any],
        one_sum: Callable[[int, int, Any], Any],
        rows: list[Any],
        block: Any,
        y: Any,
        caps: Capabilities,
        bias: Any = None,
        residual: Any = None,
        bias_base: Any = 0,
    ) -> None:
        """Finish and store one block's sums of some rows; columns past n are dropped.

        Args:
            sums: (row, vector) -> the float32 vector of sums.
            one_sum: (row, vector, lane) -> one of them.
            rows: of y and the residual, per row of sums.
            block: number of the weight block.
        """
        lanes = caps.lanes_f32
        vectors = self.columns // lanes
        for v in range(vectors):
            column = e.let(block * self.columns + v * lanes)

            def finish(
                get: Callable[[int], Any],
                read: Callable[[Any, Any], Any],
                at: Any,
                width: int,
                row: Any,
                v: int = v,
            ) -> Any:
                gate, other = (v + vectors, v) if self.gate_second else (v, v + vectors)
                first, second = (self.n, 0) if self.gate_second else (0, self.n)
                value = get(gate if self.gated else v)
                if bias is not None:
                    value = value + read(bias, bias_base + (first if self.gated else 0) + at)
                if self.activation:
                    value = activate(self.activation, e.let(value), width)
                if self.gated:
                    factor = get(other)
                    if bias is not None:
                        factor = factor + read(bias, bias_base + second + at)
                    value = value * factor
                if residual is not None:
                    value = value + read(residual, row * self.stride + at)
                return value

            def vector(v: int = v, column: Any = column, finish: Any = finish) -> None:
                read = lambda buffer, at: e.widen(e.load(buffer, at, lanes), self.in_dtype, lanes)  # noqa: E731
                for r, row in enumerate(rows):
                    value = finish(lambda i, r=r: sums(r, i), read, column, lanes, row)
                    narrow = e.narrow(e.let(value), self.out_dtype, lanes, caps)
                    e.store(y, row * self.stride + column, narrow, lanes)

            def elements(v: int = v, column: Any = column, finish: Any = finish) -> None:
                read = lambda buffer, at: e.widen(buffer[at], self.in_dtype, 1)  # noqa: E731
                for r, row in enumerate(rows):
                    with e.loop(T.max(e.i64(0), e.i64(self.n) - column)) as i:
                        value = finish(lambda j, r=r, i=i: one_sum(r, j, i), read, column + i, 1, row)
                        narrow = e.narrow(e.let(value), self.out_dtype, 1, caps)
                        e.store(y, row * self.stride + column + i, narrow, 1)

            if self.n % self.columns == 0:
                vector()
                continue
            with T.If(column + lanes <= self.n):
                with T.Then():
                    vector()
                with T.Else():
                    elements()


def activate(name: str, x: Any, lanes: int) -> Any:
    """The activation `name` (llmc.ops.ACTIVATIONS, or relu2) of float32 lanes; `x` is a named value."""
    return FUNCTIONS[name](x, lanes)


def _gelu_tanh(x: Any, lanes: int) -> Any:
    inner = (
        x * e.splat(math.sqrt(2 / math.pi), lanes) * (e.splat(1.0, lanes) + x * x * e.splat(0.044715, lanes))
    )
    return x * e.splat(0.5, lanes) * (e.splat(1.0, lanes) + vmath.tanh(e.let(inner), lanes))


def _relu(x: Any, lanes: int) -> Any:
    return T.max(e.splat(0.0, lanes), x)  # the constant first: a NaN survives


def _relu2(x: Any, lanes: int) -> Any:
    positive = e.let(_relu(x, lanes))
    return positive * positive


FUNCTIONS: dict[str, Callable[[Any, int], Any]] = {
    "silu": lambda x, lanes: x / (e.splat(1.0, lanes) + vmath.exp(e.splat(0.0, lanes) - x, lanes)),
    "gelu": lambda x, lanes: (
        x * e.splat(0.5, lanes) * (e.splat(1.0, lanes) + vmath.erf(x * e.splat(math.sqrt(0.5), lanes), lanes))
    ),
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": vmath.sigmoid,
    "tanh": vmath.tanh,
}
