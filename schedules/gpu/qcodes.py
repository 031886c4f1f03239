"""Codes of a packed quantized weight in the registers of threads: as float32 values, or as 16-bit pairs for an mma.

A thread takes neighbouring columns of one row. How many and which is up to the kernel: the sum over the columns of a group
does not depend on their order, so a kernel gives each thread columns that lie in few words, and reads x to match.
Values carry no scale; it is applied to the sum of a group, except for offsets of both kinds: zero points are subtracted
here, which is exact, and floating-point offsets are left to the kernel.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.quant.schemes import Code
from llmc.quant.weight import TABLES
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.qcodes import SCALE_BYTES, Place, QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout

# a number with only zeros in its lower mantissa bits: a code written into them is added to it
_MAGIC = {"bfloat16": (0x43004300, 128.0), "float16": (0x64006400, 1024.0), "float32": (0x4B000000, 2.0**23)}
# an e4m3 number moved into a float32 is this many times too small (exponent biases 7 and 127), and QuantCodes.scale
# makes up for the part that moving it into a float16 would leave
_E4M3_IN_F32 = 2.0**112
_TABLE_SIZE = 16
COLUMNS = 8  # that a thread unpacks at a time, of whole words or parts of one

# one instruction: of two constants, the assembler takes one at a time and makes two of it
_AND_OR = """
__device__ __forceinline__ unsigned llmc_and_or(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
"""
_FMA2 = """
__device__ __forceinline__ unsigned llmc_fma2_NAME(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.TYPEx2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
"""
_PACK2 = """
__device__ __forceinline__ unsigned llmc_pack2_NAME(float low, float high) {
  unsigned d;
  asm("cvt.rn.TYPEx2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
"""
_TYPES = {"bfloat16": "bf16", "float16": "f16"}
_ONE = {"bfloat16": 0x3F80, "float16": 0x3C00}


class Weights:
    """What the matmuls ask of a weight; this class says it for one that is not quantized.

    Attributes:
        padded_k: columns, with those that fill the last unit.
        chunk: columns that a warp takes at a time: of one group, or a unit with two of them.
        subgroups: groups in a unit if they are smaller than it, else 1.
        scaled: the sums of a group have to be multiplied with a scale.
        offsets: and the sums of x with an offset.
    """

    padded_k: int
    chunk: int
    subgroups = 1
    scaled = False
    offsets = False
    has_table = False

    def load_table(self, thread: Any, threads: int) -> None:
        """Bring the values of codes that are no integers to shared memory; a barrier must follow before they are used."""

    def chunk_at(self, base: Any, number: Any) -> Place:
        """Chunk `number` of the block at `base`; of the first group in it."""
        raise NotImplementedError

    def group_at(self, place: Place, number: Any) -> Place:
        """Group `number` (0 or 1) of a chunk."""
        raise NotImplementedError

    def unit_at(self, place: Place, number: Any) -> Any:
        """Where unit `number` of a chunk begins."""
        raise NotImplementedError

    def zero(self, place: Place, row: Any) -> Any:
        """The float32 that is subtracted from integer codes of a row."""
        return None

    def scale_of(self, place: Place, row: Any) -> tuple[Any, Any]:
        """(scale, offset or None) of a group of a row, float32."""
        raise NotImplementedError

    def words(self, unit: Any, first: Any, count: int, row: Any) -> list[list[Any]]:
        """What columns first .. first + count - 1 of a row of a unit lie in; `first` is a multiple of count."""
        raise NotImplementedError

    # -- four neighbouring rows at a time, from a multiple of 4 on, raw in registers (uint32) until they are used --

    def registers(self, count: int) -> int:
        """Registers that `count` columns of four rows take."""
        raise NotImplementedError

    def fetch(self, to: Any, unit: Any, first: Any, count: int, row: Any) -> None:
        """Ask for columns first .. first + count - 1 of a unit, of rows row .. row + 3."""
        raise NotImplementedError

    def fetched(self, held: Any, i: int, first: Any, count: int) -> list[list[Any]]:
        """Row i of them, as `words` gives it."""
        raise NotImplementedError

    scale_registers = 0  # of scales, offsets and zero points of four rows

    def fetch_scales(self, to: Any, place: Place, row: Any) -> None:
        """Ask for what belongs to a group of rows row .. row + 3."""

    def fetched_scale(self, held: Any, i: int) -> tuple[Any, Any, Any]:
        """(scale, offset or None, zero point or None) of row i, float32."""
        return None, None, None

    def floats(self, words: list[list[Any]], count: int, zero: Any) -> list[Any]:
        """float32 values of `count` columns."""
        raise NotImplementedError

    def pairs(self, words: list[list[Any]], count: int, zero: Any, dtype: str) -> list[Any]:
        """Pairs of columns (0, 1), (2, 3), ... in `dtype` (two in an uint32); exact."""
        raise NotImplementedError


class ThreadCodes(Weights):
    """Unpacks columns of a quantized weight for one thread.

    Args:
        caps: of the machine.
        layout: of the weight; 8-bit codes lie in quads.
        w: the packed bytes, as declared.
        size: their number.
        as_stored: scales are for codes as they are (of `words`), not for what `floats` and `pairs` make of them.
    """

    def __init__(
        self, caps: Capabilities, layout: QuantLayout, w: Any, size: int, as_stored: bool = False
    ) -> None:
        scheme = layout.of
        if layout.planes == (8,) and not layout.quads:
            raise ValueError(f"threads read 8-bit codes in words; {layout.as_text()} has them in bytes")
        self.codes, self.layout = QuantCodes(caps, layout, w, size, as_stored), layout
        self.code = scheme.code
        self._words = e.flat(w, size // 4, "uint32")
        self._table: Any = None
        self.padded_k, self.chunk = layout.padded_k, max(layout.piece, UNIT)
        self.subgroups, self.scaled, self.offsets = max(1, UNIT // layout.group), True, scheme.offsets

    def chunk_at(self, base: Any, number: Any) -> Place:
        """Chunk `number` of the block at byte `base`; of the first group in it."""
        return self.codes.place(base, number * (self.chunk // self.layout.piece))

    def group_at(self, place: Place, number: Any) -> Place:
        """Group `number` (0 or 1) of a chunk."""
        layout = self.layout
        return Place(
            place.units,
            place.step,
            e.let(place.scales + number * layout.scale_bytes),
            e.let(place.shifts + number * layout.shift_bytes),
            place.tops,
        )

    def load_table(self, thread: Any, threads: int) -> None:
        """Bring the values of codes that are no integers to shared memory; a barrier must follow before they are used."""
        if self.layout.of.bits != 4 or self.code is Code.INT:
            return
        self._table, self.has_table = g.shared(_TABLE_SIZE, name="values"), True
        values = [float(v) for v in TABLES[self.code]]
        register = g.local(1)
        with g.when(thread < _TABLE_SIZE):
            e.store(register, 0, e.f32(values[0]), 1)
            for i, value in enumerate(values[1:], 1):
                with g.when(thread == i):
                    e.store(register, 0, e.f32(value), 1)
            e.store(self._table, thread, register[0], 1)

    def zero(self, place: Place, row: Any) -> Any:
        """The float32 that is subtracted from integer codes of a row."""
        if self.layout.of.symmetric or self.layout.of.offsets:
            return e.f32(0.0 if self.layout.of.offsets else float(1 << (self.layout.of.bits - 1)))
        return e.let(tirx.Cast("float32", self.codes.bytes[place.shifts + row]))

    def row_values(self, base: Any, row: Any, column: Any) -> list[Any]:
        """float32 of COLUMNS stored columns of a row, with scale and offset: the block at byte `base`, from `column` on."""
        layout = self.layout
        place = self.chunk_at(base, e.let(column // self.chunk))
        first = e.let(column % UNIT)
        if self.subgroups > 1:
            place = self.group_at(place, first // layout.group)
        unit = e.let(place.units + column % self.chunk // UNIT * layout.unit_bytes)
        values = self.floats(self.words(unit, first, COLUMNS, row), COLUMNS, self.zero(place, row))
        scale, offset = self.scale_of(place, row)
        if offset is not None:
            return [e.let(v * scale + offset) for v in values]
        return [e.let(v * scale) for v in values]

    def unit_at(self, place: Place, number: Any) -> Any:
        return e.let(place.units + number * self.layout.unit_bytes)

    def scale_of(self, place: Place, row: Any) -> tuple[Any, Any]:
        scale = e.let(self.codes.scale(place.scales, row, 1, place.tops))
        return scale, e.let(self.codes.offset(place, row, 1)) if self.offsets else None

    # -- words -------------------------------------------------------------------------------------------------------

    def registers(self, count: int) -> int:
        return 4 * sum(max(1, count * bits // 32) for bits in self.layout.planes)

    def fetch(self, to: Any, unit: Any, first: Any, count: int, row: Any) -> None:
        """A word of each of the four rows, which are neighbours, is one load."""
        at, low, number = unit // 4 + row, 0, 0
        for bits in self.layout.planes:
            word = at + (low + first // (UNIT // bits)) * self.layout.n_block
            for i in range(max(1, count * bits // 32)):
                g.load_words(to, 4 * number, self._words, word + i * self.layout.n_block, 4)
                number += 1
            low += bits

    def fetched(self, held: Any, i: int, first: Any, count: int) -> list[list[Any]]:
        found, number = [], 0
        for bits in self.layout.planes:
            many = max(1, count * bits // 32)
            words = [held[4 * (number + n) + i] for n in range(many)]
            found.append([self._shifted(word, first, count, bits) for word in words])
            number += many
        return found

    @property
    def _raw(self) -> bool:
        """Whether scales are held as they are stored, four of them in a load."""
        return not (self.layout.of.super_group or self.offsets)

    @property
    def _zero_bytes(self) -> bool:
        return not (self.layout.of.symmetric or self.layout.of.offsets)

    @property
    def scale_registers(self) -> int:  # type: ignore[override]
        scales = SCALE_BYTES[self.layout.of.scale_dtype] if self._raw else 4 * (1 + self.offsets)
        return scales + self._zero_bytes

    def fetch_scales(self, to: Any, place: Place, row: Any) -> None:
        each = SCALE_BYTES[self.layout.of.scale_dtype]
        if self._raw:
            g.load_words(to, 0, self._words, (place.scales + row * each) // 4, each)
        else:
            for i in range(4):
                values = self.scale_of(place, e.let(row + i))
                for n, value in enumerate(v for v in values if v is not None):
                    e.store(to, 4 * n + i, T.reinterpret("uint32", value), 1)
        if self._zero_bytes:
            g.load_words(to, self.scale_registers - 1, self._words, (place.shifts + row) // 4, 1)

    def fetched_scale(self, held: Any, i: int) -> tuple[Any, Any, Any]:
        zero = None
        if self._zero_bytes:
            zero = e.let(tirx.Cast("float32", _byte(held[self.scale_registers - 1], i)))
        if not self._raw:
            values = [e.let(T.reinterpret("float32", held[4 * n + i])) for n in range(1 + self.offsets)]
            return values[0], values[1] if self.offsets else None, zero
        return e.let(self.codes.stored_scale(held, i)), None, zero

    def words(self, unit: Any, first: Any, count: int, row: Any) -> list[list[Any]]:
        """The words with columns first .. first + count - 1 of a row, per plane, shifted so that `first` is lowest.

        Args:
            unit: byte at which the unit of 32 columns begins.
            first: a multiple of count (4, 8 or 32).
        """
        nb, at = self.layout.n_block, unit // 4 + row
        out = []
        low = 0
        for bits in self.layout.planes:
            per_word = UNIT // bits
            many = max(1, count // per_word)
            word = e.let(at + (low + first // per_word) * nb)
            found = [e.let(self._words[word + i * nb]) for i in range(many)]
            out.append([self._shifted(w, first, count, bits) for w in found])
            low += bits
        return out

    def _shifted(self, word: Any, first: Any, count: int, bits: int) -> Any:
        """A word of a plane with column `first` lowest."""
        per_word = UNIT // bits
        if count >= per_word:
            return word
        # columns lie in pairs, one in each half of the word; of quads, in bytes
        shift = first % per_word * bits // (1 if self.layout.quads else 2)
        if self.layout.quads and bits == 4:  # four columns in the lower halves of bytes, four in the upper
            shift = first % per_word // 4 * 4
        return e.let(T.shift_right(word, tirx.Cast("uint32", shift)))

    def _code(self, words: list[list[Any]], i: int, clean: bool = True) -> Any:
        """Code of column i behind the first, in the lowest bits of an uint32."""
        if self.layout.quads:
            bits = self.layout.of.bits
            word, column = words[0][i * bits // 32], i % (32 // bits)
            shift = 8 * (column % 4) + (column // 4 * 4 if bits == 4 else 0)
            return _masked(_right(word, shift), (1 << bits) - 1)
        code, low = None, 0
        for found, bits in zip(words, self.layout.planes, strict=True):
            per_word = UNIT // bits
            column = i % per_word
            shift = bits * (column // 2) + 16 * (column % 2) - low
            part = _masked(_right(found[i // per_word], shift), ((1 << bits) - 1) << low)
            code = part if code is None else T.bitwise_or(code, part)
            low += bits
        return code

    # -- values ------------------------------------------------------------------------------------------------------

    def floats(self, words: list[list[Any]], count: int, zero: Any) -> list[Any]:
        """float32 values of `count` columns."""
        return [self._float(self._code(words, i), zero) for i in range(count)]

    def _float(self, code: Any, zero: Any) -> Any:
        if self.code is Code.INT:
            bits, base = _MAGIC["float32"]
            number = T.reinterpret("float32", T.bitwise_or(code, _u32(bits)))
            return e.let(number - (zero + e.f32(base)))
        if self.code is Code.E4M3:
            return e4m3_float(code, _E4M3_IN_F32)
        return e.let(self._table[tirx.Cast("int32", code)])

    def pairs(self, words: list[list[Any]], count: int, zero: Any, dtype: str) -> list[Any]:
        """Pairs of columns (0, 1), (2, 3), ... in `dtype` (two in an uint32); exact."""
        if self.code is not Code.INT or self.layout.quads:
            values = self.floats(words, count, zero)
            return [pack(values[i], values[i + 1], dtype) for i in range(0, count, 2)]
        bits, base = _MAGIC[dtype]
        negative = e.f32(0.0) - (zero + e.f32(base))
        subtract = pack(negative, negative, dtype)
        one = _u32(_ONE[dtype] * 0x10001)
        out = []
        for i in range(0, count, 2):
            number, low = _u32(bits), 0
            for found, plane in zip(words, self.layout.planes, strict=True):
                per_word = UNIT // plane
                mask = ((1 << plane) - 1) << low
                part = _right(found[i // per_word], plane * (i % per_word // 2) - low)
                number = e.let(
                    g.device_call(
                        "llmc_and_or", _AND_OR, part, _u32(mask | mask << 16), number, result="uint32"
                    )
                )
                low += plane
            name = _TYPES[dtype]
            source = _FMA2.replace("NAME", name).replace("TYPE", name)
            out.append(
                e.let(g.device_call(f"llmc_fma2_{name}", source, number, one, subtract, result="uint32"))
            )
        return out


def e4m3_float(code: Any, factor: float = 2.0**120) -> Any:
    """float32 of an e4m3 number, uint32, times `factor` / 2**120."""
    sign = T.shift_left(T.bitwise_and(code, _u32(0x80)), _u32(24))
    rest = T.shift_left(T.bitwise_and(code, _u32(0x7F)), _u32(20))
    return e.let(T.reinterpret("float32", T.bitwise_or(sign, rest)) * e.f32(factor))


def pack(low: Any, high: Any, dtype: str) -> Any:
    """Two float32 as a pair of `dtype`, rounded to nearest even."""
    name = _TYPES[dtype]
    source = _PACK2.replace("NAME", name).replace("TYPE", name)
    return e.let(g.device_call(f"llmc_pack2_{name}", source, low, high, result="uint32"))


def _byte(word: Any, i: int) -> Any:
    """Byte i of an uint32."""
    return _masked(_right(word, 8 * i), 0xFF)


def _u32(value: int) -> Any:
    return tirx.IntImm("uint32", value)


def _right(word: Any, shift: int) -> Any:
    if shift == 0:
        return word
    return T.shift_right(word, _u32(shift)) if shift > 0 else T.shift_left(word, _u32(-shift))


def _masked(word: Any, mask: int) -> Any:
    return T.bitwise_and(word, _u32(mask))
