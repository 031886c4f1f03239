"""How many bytes a kernel moves and how many operations it does, as formulas in the sizes of a step.

A formula is a sum of products, as text ``8192 + 4096*T + 2*P``, so that a manifest can hold it. Its symbols:

    T       tokens of the step
    B       sequences
    R       rows of logits
    C, C64  cached tokens that the queries see, over all sequences; with a number: of the last 64 tokens before each query
    P, P64  pairs of a query and a key that it sees
    min(8,2*T)   the smaller one; experts that are read at all
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TERM = re.compile(r"^(-?\d+(?:\.\d+)?)(?:\*(.+))?$")
_SYMBOL = re.compile(r"min\((\d+),([^()]+)\)|([A-Z])(\d*)")


@dataclass(frozen=True)
class Workload:
    """The sizes of a step.

    Attributes:
        queries: new tokens of each sequence.
        contexts: tokens of each sequence, the new ones included.
        rows: rows of logits; None = one per sequence.
    """

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    rows: int | None = None

    @staticmethod
    def decode(batch: int, context: int) -> Workload:
        """One new token for each of `batch` sequences of `context` tokens."""
        return Workload((1,) * batch, (context,) * batch)

    @staticmethod
    def prefill(tokens: int) -> Workload:
        """A prompt of `tokens`."""
        return Workload((tokens,), (tokens,))

    def value(self, symbol: str, window: int) -> int:
        """The value of a symbol.

        Raises:
            KeyError: no such symbol.
        """
        return {
            "T": lambda: sum(self.queries),
            "B": lambda: len(self.queries),
            "R": lambda: len(self.queries) if self.rows is None else self.rows,
            "C": lambda: sum(self._seen(window)),
            "P": lambda: self._pairs(window),
        }[symbol]()

    def _seen(self, window: int) -> list[int]:
        pairs = zip(self.queries, self.contexts, strict=True)
        return [min(c, n + window - 1) if window else c for n, c in pairs]

    def _pairs(self, window: int) -> int:
        total = 0
        for n, c in zip(self.queries, self.contexts, strict=True):
            first = c - n + 1  # keys that the first query sees, without a window
            if not window or c <= window:
                total += n * first + n * (n - 1) // 2
                continue
            growing = max(0, min(n, window - first))  # queries that see less than a window
            total += growing * first + growing * (growing - 1) // 2 + (n - growing) * window
        return total


@dataclass(frozen=True)
class Formula:
    """A sum of products.

    Attributes:
        terms: product of symbols ("" = none) -> its factor, in the order of the products.
    """

    terms: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def of(factor: float, *symbols: str) -> Formula:
        """One product."""
        return Formula((("*".join(sorted(s for s in symbols if s)), factor),) if factor else ())

    @staticmethod
    def parse(text: str) -> Formula:
        """Inverse of str().

        Raises:
            ValueError: `text` is no formula.
        """
        total = Formula()
        for part in text.split(" + "):
            found = _TERM.match(part.strip())
            if found is None:
                raise ValueError(f"{text!r} is no formula")
            symbols = _factors(found[2] or "")
            total += Formula.of(float(found[1]), *symbols)
        return total

    def __str__(self) -> str:
        parts = [f"{factor:.12g}" + (f"*{symbols}" if symbols else "") for symbols, factor in self.terms]
        return " + ".join(parts) or "0"

    def __add__(self, other: Formula) -> Formula:
        total = dict(self.terms)
        for symbols, factor in other.terms:
            total[symbols] = total.get(symbols, 0) + factor
        return Formula(tuple(sorted((s, f) for s, f in total.items() if f)))

    def __mul__(self, other: Formula | float) -> Formula:
        if not isinstance(other, Formula):
            return Formula(tuple((s, f * other) for s, f in self.terms if other))
        total = Formula()
        for left, a in self.terms:
            for right, b in other.terms:
                total += Formula.of(a * b, *_factors(left), *_factors(right))
        return total

    @property
    def is_constant(self) -> bool:
        return all(not symbols for symbols, _ in self.terms)

    def at(self, work: Workload) -> float:
        """The value for a step of these sizes.

        Raises:
            KeyError: a symbol that no workload has.
        """
        return sum(factor * _product(symbols, work) for symbols, factor in self.terms)

    def with_symbols(self, values: dict[str, Formula]) -> Formula:
        """Symbols replaced by formulas; those that `values` lacks stay."""
        total = Formula()
        for symbols, factor in self.terms:
            product = Formula.of(factor)
            for symbol in _factors(symbols):
                product = product * _replaced(symbol, values)
            total += product
        return total


@dataclass(frozen=True)
class KernelCost:
    """What a kernel does that the shapes of its tensors do not say.

    Formulas may also have the symbols ``N`` (rows of the first result: all its dimensions but the last) and ``D0_1``
    (dimension 1 of argument 0).

    Attributes:
        kind: the class of kernel, in words.
        operations: arithmetic operations; a multiplication and an addition count as two.
        read: argument -> bytes read of it, where that is not the whole tensor.
        written: argument that is changed in place -> bytes written to it; negative numbers count results from the
            first (-1), where not the whole is written.
    """

    kind: str
    operations: Formula = Formula()
    read: tuple[tuple[int, Formula], ...] = ()
    written: tuple[tuple[int, Formula], ...] = ()

    def as_text(self) -> str:
        """A line for an attribute of the function."""
        parts = [self.kind, str(self.operations)]
        parts += [",".join(f"{i}={f}" for i, f in table) for table in (self.read, self.written)]
        return "|".join(parts)

    @staticmethod
    def parse(text: str) -> KernelCost:
        """Inverse of as_text."""
        kind, operations, *tables = text.split("|")
        read, written = (
            tuple(
                (int(index), Formula.parse(formula))
                for index, _, formula in (
                    entry.partition("=") for entry in re.split(r",(?=-?\d+=)", table) if entry
                )
            )
            for table in tables
        )
        return KernelCost(kind, Formula.parse(operations), read, written)


def smaller(bound: int, formula: Formula) -> str:
    """The symbol for min(bound, formula); `formula` is one product."""
    return f"min({bound},{formula})"


def _factors(symbols: str) -> list[str]:
    """The symbols of a product."""
    found = [m.group(0) for m in re.finditer(r"min\([^()]*\)|D\d+_\d+|[A-Z]\d*", symbols)]
    if "*".join(found) != symbols:
        raise ValueError(f"{symbols!r} is no product of symbols")
    return found


def _product(symbols: str, work: Workload) -> float:
    value = 1.0
    for symbol in _factors(symbols):
        found = _SYMBOL.fullmatch(symbol)
        if found is None:
            raise KeyError(symbol)
        if found[1]:
            value *= min(int(found[1]), Formula.parse(found[2]).at(work))
        else:
            value *= work.value(found[3], int(found[4] or 0))
    return value


def _replaced(symbol: str, values: dict[str, Formula]) -> Formula:
    if symbol in values:
        return values[symbol]
    found = _SYMBOL.fullmatch(symbol)
    if found is not None and found[1]:
        return Formula.of(1, smaller(int(found[1]), Formula.parse(found[2]).with_symbols(values)))
    return Formula.of(1, symbol)
