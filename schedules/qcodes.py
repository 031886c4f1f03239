"""Codes of a packed quantized weight on their way to the multiply-add: unpacking in registers.

Which form suits depends on the width and the machine: bf16 pairs for a two-way dot product, else float32. The values
carry no scale: that is applied once per group, to the sums.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.quant.schemes import Code
from llmc.quant.weight import E2M1_TABLE, NF4_TABLE
from llmc.schedules import emit as e
from llmc.schedules.lookup import Lookup
from llmc.schedules.qlayout import UNIT, QuantLayout

# an e4m3 number moved into a float16 is this many times too small (exponent biases 7 and 15)
_E4M3_IN_F16 = 2.0**8


class QuantCodes:
    """Unpacks units of one layout.

    Args:
        caps: of the machine.
        layout: of the weight.
        w: the packed bytes, as declared.
        size: their number.
    """

    def __init__(self, caps: Capabilities, layout: QuantLayout, w: Any, size: int) -> None:
        self.caps, self.layout, self.lanes = caps, layout, caps.lanes_f32
        if layout.n_block % self.lanes:
            raise ValueError(f"n_block {layout.n_block} is not a multiple of {self.lanes} lanes")
        self.vectors = layout.n_block // self.lanes
        scheme = layout.of
        self.bytes = e.flat(w, size)
        signed = layout.planes == (8,) and scheme.code is Code.INT and not layout.quads
        self._byte_codes = e.flat(w, size, "int8") if layout.planes == (8,) else None
        self._words = e.flat(w, size // 4, "int32") if layout.planes != (8,) else None
        stored = {"float32": ("float32", 4), "float16": ("float16", 2), "e8m0": ("uint8", 1)}
        self._scale_dtype, self._scale_size = stored[scheme.scale_dtype]
        self._scales = e.flat(w, size // self._scale_size, self._scale_dtype)
        self._offset = 0 if signed or scheme.code is not Code.INT else 1 << (scheme.bits - 1)
        self.lookup = lookup_for(layout)
        # a power of two that the values lack; it is put into the scales
        self._factor = _E4M3_IN_F16 if scheme.code is Code.E4M3 else 1.0

    @property
    def fused_pairs(self) -> bool:
        """Whether `pairs` exists: a table of at most 64 values that bf16 holds exactly, and a dot product."""
        return self.caps.has_bf16_dot and self.lookup is not None and self.exact_in_bf16

    @property
    def exact_in_bf16(self) -> bool:
        """Whether all values (without the scale) have at most 8 significant bits."""
        return self.layout.of.code is not Code.NF4

    def import_text(self) -> dict[str, Any]:
        """Annotations for one loop of a kernel that unpacks."""
        text = str(e.import_text(self.caps).get("pragma_import_llvm", ""))
        if self.lookup is not None:
            text += self.lookup.text(self.caps)
        return {"pragma_import_llvm": text} if text else {}

    def floats(self, at: Any, t: int, v: int) -> tuple[Any, Any]:
        """float32 values of columns 2t and 2t+1 of the unit at byte `at`, for the v-th vector of rows."""
        lanes, nb = self.lanes, self.layout.n_block
        if self._byte_codes is not None:
            first = at + 2 * t * nb + v * lanes
            even, odd = (e.load(self._byte_codes, first + p * nb, lanes) for p in (0, 1))
            return self._of_bytes(even, lanes), self._of_bytes(odd, lanes)
        low, high = (self._planes(at, t, v, shift) for shift in (0, 16))
        return self._of_codes(low, lanes), self._of_codes(high, lanes)

    def pairs(self, at: Any, t: int, v: int) -> Any:
        """The same two columns as 16 lanes of bf16 pairs; only if fused_pairs."""
        assert self.lookup is not None
        planes, codes, low = self.layout.planes, None, 0
        base = e.let(at // 4)
        for bits in planes:
            each = 16 // bits
            word = self._word(base, low, t // each, v)
            move = bits * (t % each) - low
            part = _shifted(word, move, self.lanes)
            if len(planes) > 1:
                mask = ((1 << bits) - 1) << low
                part = T.bitwise_and(part, e.const("int32", mask | mask << 16, self.lanes))
            codes = part if codes is None else T.bitwise_or(codes, part)
            low += bits
        return self.lookup.pairs(codes)

    def value(self, at: Any, column: Any, row: Any) -> Any:
        """float32 value of one code: column of the unit at byte `at`, row of the block."""
        nb = self.layout.n_block
        if self.layout.quads:
            return self._of_quad(at, column, row)
        if self._byte_codes is not None:
            return self._of_bytes(self._byte_codes[at + column * nb + row], 1)
        assert self._words is not None
        code, low, base = None, 0, at // 4
        for bits in self.layout.planes:
            each = 16 // bits
            pair = column // 2
            word = self._words[base + (low + pair // each) * nb + row]
            shift = tirx.Cast("int32", bits * (pair % each) + 16 * (column % 2))
            part = T.bitwise_and(T.shift_right(word, shift), e.const("int32", (1 << bits) - 1, 1))
            part = T.shift_left(part, e.const("int32", low, 1))
            code = part if code is None else T.bitwise_or(code, part)
            low += bits
        return self._of_codes(code, 1)

    def _of_quad(self, at: Any, column: Any, row: Any) -> Any:
        per_word = 32 // self.layout.of.bits
        byte = at + (column // per_word * self.layout.n_block + row) * 4 + column % 4
        code = tirx.Cast("int32", self.bytes[byte])
        if self.layout.of.bits == 4:
            shift = tirx.Cast("int32", column % 8 // 4 * 4)
            code = T.bitwise_and(T.shift_right(code, shift), e.const("int32", 15, 1))
        return tirx.Cast("float32", code - e.const("int32", self._offset, 1))

    def scale(self, at: Any, row: Any, lanes: int) -> Any:
        """float32 scales of `lanes` rows from `row` on; `at` is the byte where the group's scales begin."""
        index = at // self._scale_size + row
        data = self._scales[index] if lanes == 1 else e.load(self._scales, index, lanes)
        if self.layout.of.scale_dtype == "e8m0":
            bits = T.shift_left(tirx.Cast(e.vec("uint32", lanes), data), e.const("uint32", 23, lanes))
            data = T.reinterpret(e.vec("float32", lanes), bits)
        elif self._scale_dtype == "float16":
            data = tirx.Cast(e.vec("float32", lanes), data)
        return data if self._factor == 1.0 else data * e.splat(self._factor, lanes)

    def zero(self, at: Any, row: Any, lanes: int) -> Any:
        """float32: what to subtract from `lanes` rows' values; `at` is where the group's scales begin."""
        index = at + self.layout.scale_bytes + row
        data = self.bytes[index] if lanes == 1 else e.load(self.bytes, index, lanes)
        half = float(1 << (self.layout.of.bits - 1))
        return tirx.Cast(e.vec("float32", lanes), data) - e.splat(half, lanes)

    def _word(self, base: Any, low: int, j: int, v: int) -> Any:
        """Word j of the plane whose lowest bit is `low`; LLVM loads a word once for all its codes."""
        # planes follow one another, and those below `low` together have `low` words per row
        return e.load(self._words, base + (low + j) * self.layout.n_block + v * self.lanes, self.lanes)

    def _planes(self, at: Any, t: int, v: int, half: int) -> Any:
        """int32 codes of column 2t (half 0) or 2t+1 (half 16); upper bits are junk if a table takes them."""
        planes, codes, low = self.layout.planes, None, 0
        base = e.let(at // 4)
        for bits in planes:
            each = 16 // bits
            move = bits * (t % each) + half - low
            part = _shifted(self._word(base, low, t // each, v), move, self.lanes)
            if len(planes) > 1 or not self._by_table():
                part = T.bitwise_and(part, e.const("int32", ((1 << bits) - 1) << low, self.lanes))
            codes = part if codes is None else T.bitwise_or(codes, part)
            low += bits
        return codes

    def _by_table(self) -> bool:
        """Whether float32 values come from a table: always if they are no integers, else if it is quick."""
        if self.layout.of.code is not Code.INT:
            return True
        return self.caps.has_lookup and self.lanes == 16 and self.layout.of.bits <= 4

    def _of_codes(self, codes: Any, lanes: int) -> Any:
        if self.layout.of.code is not Code.INT or (lanes > 1 and self._by_table()):
            assert self.lookup is not None
            return self.lookup.floats(codes, lanes)
        return tirx.Cast(e.vec("float32", lanes), codes - e.const("int32", self._offset, lanes))

    def _of_bytes(self, codes: Any, lanes: int) -> Any:
        if self.layout.of.code is Code.INT:
            return tirx.Cast(e.vec("float32", lanes), tirx.Cast(e.vec("int32", lanes), codes))
        wide = T.shift_left(tirx.Cast(e.vec("int16", lanes), codes), e.const("int16", 7, lanes))
        # the sign was extended into the bit below the float16's sign as well
        half = T.bitwise_and(wide, e.const("int16", -0x4001, lanes))
        return tirx.Cast(e.vec("float32", lanes), T.reinterpret(e.vec("float16", lanes), half))


def lookup_for(layout: QuantLayout) -> Lookup | None:
    """The table of a layout's values; None for 8-bit codes."""
    scheme = layout.of
    if scheme.bits == 8:
        return None
    if scheme.code is Code.NF4:
        return Lookup("nf4", tuple(NF4_TABLE.tolist()))
    if scheme.code is Code.E2M1:
        return Lookup("e2m1", tuple(E2M1_TABLE.tolist()))
    half = 1 << (scheme.bits - 1)
    return Lookup(f"int{scheme.bits}", tuple(float(i) for i in range(-half, half)))


def _shifted(word: Any, move: int, lanes: int) -> Any:
    """Bits moved down by `move` places (up if negative)."""
    if move == 0:
        return word
    amount = e.const("int32", abs(move), lanes)
    return T.shift_right(word, amount) if move > 0 else T.shift_left(word, amount)


PAIRS = UNIT // 2  # column pairs of a unit
