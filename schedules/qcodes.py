"""Codes of a packed quantized weight on their way to the multiply-add: unpacking in registers.

Which form suits depends on the width and the machine: bf16 pairs for a two-way dot product, else float32. The values
carry no scale: that is applied once per group, to the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.quant.schemes import SCALE_BYTES, Code
from llmc.quant.weight import TABLES
from llmc.schedules import emit as e
from llmc.schedules.kv_codes import CODE_FACTOR, E4M3, code_values
from llmc.schedules.lookup import Lookup
from llmc.schedules.qlayout import UNIT, QuantLayout

PAIRS = UNIT // 2  # column pairs of a unit


@dataclass(frozen=True)
class Place:
    """Where a piece of a block lies, in bytes.

    Attributes:
        units: its first unit.
        step: the step of that unit that it begins at; not 0 only for pieces shorter than a unit.
        scales, shifts: its group's scales, and zero points or offsets, [n_block].
        tops: scales, then offsets, of its super-group.
    """

    units: Any
    step: Any
    scales: Any
    shifts: Any
    tops: Any


class QuantCodes:
    """Unpacks pieces of one layout.

    A unit is taken in `steps` steps, of `each` column pairs: what the words of its widest plane hold.

    Args:
        caps: of the machine.
        layout: of the weight.
        w: the packed bytes, as declared.
        size: their number.
        as_stored: codes are multiplied as they are; else e4m3 numbers are moved into wider floats.
    """

    def __init__(
        self, caps: Capabilities, layout: QuantLayout, w: Any, size: int, as_stored: bool = False
    ) -> None:
        self.caps, self.layout, self.lanes = caps, layout, caps.lanes_f32
        if layout.n_block % self.lanes:
            raise ValueError(f"n_block {layout.n_block} is not a multiple of {self.lanes} lanes")
        self.vectors = layout.n_block // self.lanes
        scheme = layout.of
        self.bytes = e.flat(w, size)
        self.signed = e.flat(w, size, "int8")
        self.in_bytes = layout.planes == (8,)
        self._words = None if self.in_bytes else e.flat(w, size // 4, "int32")
        dtype = "uint8" if scheme.scale_dtype == "e8m0" else scheme.scale_dtype
        self._floats = e.flat(w, size // SCALE_BYTES[scheme.scale_dtype], dtype)
        self.order = e.flat(w, size // 4, "int32") if scheme.order else None
        # what float values of integer codes lack
        self.half = float(1 << (scheme.bits - 1)) if scheme.code is Code.INT else 0.0
        self.lookup = lookup_for(layout)
        # a power of two that the values lack; it is put into the scales
        self._factor = CODE_FACTOR[E4M3] if scheme.code is Code.E4M3 and not as_stored else 1.0
        self.each = 1 if self.in_bytes else 16 // max(layout.planes)
        self.steps = PAIRS // self.each
        self.has_shift = layout.shift_bytes > 0

    @property
    def exact_in_bf16(self) -> bool:
        """Whether all values (without the scale) have at most 8 significant bits."""
        return self.layout.of.code is not Code.NF4

    @property
    def by_pairs(self) -> bool:
        """Whether `Step.pairs` exists: values that bf16 holds exactly, and a dot product."""
        return self.caps.has_bf16_dot and self.exact_in_bf16

    @property
    def by_bytes(self) -> bool:
        """Whether a word of 4-bit codes is looked up by its bytes, two pairs at a time."""
        return self.exact_in_bf16 and self.caps.has_lane_operands and self.layout.planes == (4,)

    @property
    def turns(self) -> tuple[int, ...]:
        """The pairs of a step in the order in which they take the fewest registers."""
        return (0, 2, 1, 3) if self.by_bytes else tuple(range(self.each))

    def import_text(self) -> dict[str, Any]:
        """Annotations for one loop of a kernel that unpacks."""
        text = str(e.import_text(self.caps).get("pragma_import_llvm", ""))
        if self.lookup is not None:
            text += self.lookup.text(self.caps)
        return {"pragma_import_llvm": text} if text else {}

    def place(self, base: Any, p: Any) -> Place:
        """Piece p of the block that begins at byte `base`."""
        layout = self.layout
        units = layout.span // UNIT
        g, rest = _divided(p, layout.group // layout.piece)
        top, g = _divided(g, layout.super_group // layout.group) if layout.of.super_group else (0, g)
        in_span = layout.span // layout.group
        span, slot = _divided(g, in_span)
        above = base + top * layout.super_bytes
        at = e.let(above + span * layout.group_bytes)
        scales = at + units * layout.unit_bytes
        step = slot * (self.steps * layout.group // UNIT) if in_span > 1 else 0
        return Place(
            e.let(at + rest * (layout.piece // UNIT * layout.unit_bytes)),
            step,
            e.let(scales + slot * layout.scale_bytes),
            e.let(scales + in_span * layout.scale_bytes + slot * layout.shift_bytes),
            e.let(above + layout.super_group // layout.span * layout.group_bytes),
        )

    def step(self, place: Place, s: Any, row: Any, vectors: int) -> Step:
        """The words of step s of a piece for `vectors` vectors of outputs, from `row` of the block on."""
        return Step(self, place, s, row, vectors)

    def value(self, place: Place, column: Any, row: Any) -> Any:
        """float32 value of one code: column of a piece, row of the block; without scale, zero point and offset."""
        layout = self.layout
        nb = layout.n_block
        column = e.let(column + place.step * (2 * self.each))
        at = e.let(place.units + column // UNIT * layout.unit_bytes)
        column = e.let(column % UNIT)
        if layout.quads:
            return self._of_quad(at, column, row)
        if self.in_bytes:
            return self.of_bytes(self.signed[at + column * nb + row], 1)
        assert self._words is not None
        code, low = None, 0
        for bits in layout.planes:
            each = 16 // bits
            pair = column // 2
            word = self._words[at // 4 + (low + pair // each) * nb + row]
            shift = tirx.Cast("int32", bits * (pair % each) + 16 * (column % 2))
            part = T.bitwise_and(T.shift_right(word, shift), e.const("int32", (1 << bits) - 1, 1))
            part = T.shift_left(part, e.const("int32", low, 1))
            code = part if code is None else T.bitwise_or(code, part)
            low += bits
        return self.of_codes(code, 1)

    def _of_quad(self, at: Any, column: Any, row: Any) -> Any:
        per_word = 32 // self.layout.of.bits
        byte = at + (column // per_word * self.layout.n_block + row) * 4 + column % 4
        code = tirx.Cast("int32", self.bytes[byte])
        if self.layout.of.bits == 4:
            shift = tirx.Cast("int32", column % 8 // 4 * 4)
            code = T.bitwise_and(T.shift_right(code, shift), e.const("int32", 15, 1))
        return tirx.Cast("float32", code - e.const("int32", int(self.half), 1))

    def scale(self, at: Any, row: Any, lanes: int, top: Any = None) -> Any:
        """float32 scales of `lanes` rows from `row` on; a Place says `at` and `top` (of the super-group, if any)."""
        data = self._level(at, top, row, lanes)
        return data if self._factor == 1.0 else data * e.splat(self._factor, lanes)

    def stored_scale(self, words: Any, i: int) -> Any:
        """float32 scale i of some that lie in uint32 as they are stored; not of super-groups."""
        dtype = self.layout.of.scale_dtype
        size = 8 * SCALE_BYTES[dtype]
        word = words[i * size // 32]
        bits = T.bitwise_and(
            T.shift_right(word, e.const("uint32", i * size % 32, 1)), e.const("uint32", (1 << size) - 1, 1)
        )
        if dtype == "e8m0":
            wide = T.reinterpret("float32", T.shift_left(bits, e.const("uint32", 23, 1)))
        elif dtype == "float16":
            wide = tirx.Cast("float32", T.reinterpret("float16", tirx.Cast("uint16", bits)))
        else:  # float32, or the upper half of one
            wide = T.reinterpret(
                "float32", T.shift_left(bits, e.const("uint32", 32 - size, 1)) if size < 32 else word
            )
        return wide if self._factor == 1.0 else wide * e.f32(self._factor)

    def zero(self, place: Place, row: Any, lanes: int) -> Any:
        """float32: what to subtract from the values, for schemes with zero points."""
        index = place.shifts + row
        data = self.bytes[index] if lanes == 1 else e.load(self.bytes, index, lanes)
        return tirx.Cast(e.vec("float32", lanes), data) - e.splat(self.half, lanes)

    def offset(self, place: Place, row: Any, lanes: int) -> Any:
        """float32 offsets, for schemes with them."""
        second = SCALE_BYTES[self.layout.of.scale_dtype] * self.layout.n_block
        return self._level(place.shifts, place.tops + second, row, lanes)

    def shift(self, place: Place, row: Any, lanes: int, scale: Any) -> Any:
        """float32: what the sum of the activations is multiplied with, for zero points or offsets."""
        if self.layout.of.offsets:
            return self.offset(place, row, lanes) + scale * e.splat(self.half, lanes)
        return e.splat(0.0, lanes) - self.zero(place, row, lanes) * scale

    def _level(self, at: Any, top: Any, row: Any, lanes: int) -> Any:
        """Scales or offsets, from one level or two."""
        if not self.layout.of.super_group:
            return self._stored(at, row, lanes)
        index = at + row
        each = self.signed[index] if lanes == 1 else e.load(self.signed, index, lanes)
        wide = tirx.Cast(e.vec("float32", lanes), tirx.Cast(e.vec("int32", lanes), each))
        return wide * self._stored(top, row, lanes)

    def _stored(self, at: Any, row: Any, lanes: int) -> Any:
        """Stored floats as float32."""
        dtype = self.layout.of.scale_dtype
        index = at // SCALE_BYTES[dtype] + row
        data = self._floats[index] if lanes == 1 else e.load(self._floats, index, lanes)
        if dtype == "e8m0":
            bits = T.shift_left(tirx.Cast(e.vec("uint32", lanes), data), e.const("uint32", 23, lanes))
            return T.reinterpret(e.vec("float32", lanes), bits)
        return e.widen(data, dtype, lanes)

    def by_table(self) -> bool:
        """Whether float32 values come from a table: always if they are no integers, else if it is quick."""
        if self.layout.of.code is not Code.INT:
            return True
        return self.caps.has_lookup and self.lanes == 16 and self.layout.of.bits <= 4

    def of_codes(self, codes: Any, lanes: int) -> Any:
        if self.layout.of.code is not Code.INT or (lanes > 1 and self.by_table()):
            assert self.lookup is not None
            return self.lookup.floats(codes, lanes)
        return tirx.Cast(e.vec("float32", lanes), codes - e.const("int32", int(self.half), lanes))

    def of_bytes(self, codes: Any, lanes: int) -> Any:
        return code_values(codes, "int8" if self.layout.of.code is Code.INT else E4M3, lanes)


class Step:
    """`each` column pairs of some vectors of outputs, in registers.

    Args:
        place: of the piece.
        s: number of the step in it.
        row: first output.
        vectors: how many.
    """

    def __init__(self, codes: QuantCodes, place: Place, s: Any, row: Any, vectors: int) -> None:
        self._codes, self.vectors = codes, vectors
        self._nibbles: list[tuple[Any, Any]] | None = None
        layout, lanes, nb = codes.layout, codes.lanes, codes.layout.n_block
        if codes.in_bytes:
            at = place.units + (place.step + s) * (2 * nb) + row
            bytes_ = [
                [e.load(codes.signed, at + p * nb + v * lanes, lanes) for p in (0, 1)] for v in range(vectors)
            ]
            self._bytes = [[e.let(b) for b in pair] for pair in bytes_]
            return
        widest = max(layout.planes)
        # (lowest bit, width, words) of each plane; words of narrower planes are shared by several steps
        self._planes: list[tuple[int, int, list[Any]]] = []
        unit, j = place.units, place.step + s
        if len(layout.planes) > 1:
            unit, j = e.let(unit + j // codes.steps * layout.unit_bytes), e.let(j % codes.steps)
        low = 0
        for bits in layout.planes:
            share = widest // bits
            word, part = _divided(j, share)
            at = e.let(unit // 4 + (low + word) * nb + row)
            words = [e.load(codes._words, at + v * lanes, lanes) for v in range(vectors)]
            if share > 1:
                amount = e.splat(tirx.Cast("int32", part * (bits * codes.each)), lanes)
                words = [T.shift_right(w, amount) for w in words]
            self._planes.append((low, bits, [e.let(w) for w in words]))
            low += bits
        if codes.by_bytes:
            self._nibbles = [e.nibbles(word, lanes) for word in self._planes[0][2]]

    def pairs(self, i: int, v: int) -> Any:
        """Column pair i of the step as 16 lanes of bf16 pairs; only if by_pairs."""
        codes = self._codes
        if codes.in_bytes:
            return e.exact_pairs(*self.floats(i, v), codes.lanes)
        assert codes.lookup is not None
        if self._nibbles is not None:
            return codes.lookup.pairs_of_bytes(self._nibbles[v][i % 2], i // 2)
        assert codes.by_pairs
        return codes.lookup.pairs(self._collect(i, v, 0, both=True))

    def floats(self, i: int, v: int) -> tuple[Any, Any]:
        """float32 values of both columns of pair i."""
        codes = self._codes
        if codes.in_bytes:
            even, odd = (codes.of_bytes(b, codes.lanes) for b in self._bytes[v])
            return even, odd
        if self._nibbles is not None:
            pair = e.let(self.pairs(i, v))
            return e.pair_even(pair, codes.lanes), e.pair_odd(pair, codes.lanes)
        low, high = (self._collect(i, v, half, both=False) for half in (0, 16))
        return codes.of_codes(low, codes.lanes), codes.of_codes(high, codes.lanes)

    def _collect(self, i: int, v: int, half: int, *, both: bool) -> Any:
        """Codes of pair i put together from the planes; upper bits are junk if a table takes them.

        both: two codes, one in each half word; else the one in the lower (half 0) or upper (16) half.
        """
        lanes = self._codes.lanes
        clean = len(self._planes) > 1 or not (both or self._codes.by_table())
        codes = None
        for low, bits, words in self._planes:
            part = _shifted(words[v], bits * i + half - low, lanes)
            if clean:
                mask = ((1 << bits) - 1) << low
                part = T.bitwise_and(part, e.const("int32", mask | mask << 16 if both else mask, lanes))
            codes = part if codes is None else T.bitwise_or(codes, part)
        return codes


def lookup_for(layout: QuantLayout) -> Lookup | None:
    """The table of a layout's values; None for 8-bit codes."""
    scheme = layout.of
    if scheme.bits == 8:
        return None
    if scheme.code is not Code.INT:
        return Lookup(scheme.code.value, tuple(TABLES[scheme.code].tolist()))
    half = 1 << (scheme.bits - 1)
    return Lookup(f"int{scheme.bits}", tuple(float(i) for i in range(-half, half)))


def _divided(value: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder; a remainder of 1 parts is the number 0."""
    return (value, 0) if by == 1 else (value // by, value % by)


def _shifted(word: Any, move: int, lanes: int) -> Any:
    """Bits moved down by `move` places (up if negative)."""
    if move == 0:
        return word
    amount = e.const("int32", abs(move), lanes)
    return T.shift_right(word, amount) if move > 0 else T.shift_left(word, amount)
