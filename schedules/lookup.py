"""Small tables held in registers: a vector of codes becomes a vector of values by one permutation.

As LLVM text, because TIR has neither constant vectors nor permutations by a variable. Where a processor has no such
permutation the same function reads a constant array, lane by lane.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities


@dataclass(frozen=True)
class Lookup:
    """A table of float32 values; its length is a power of two of at most 64.

    Attributes:
        name: part of the function's names; the same name must always stand for the same values.
        values: the table.
    """

    name: str
    values: tuple[float, ...]

    def text(self, caps: Capabilities) -> str:
        """LLVM functions for `floats` (scalar and vector) and `pairs`, where a machine has a use for them."""
        lanes = caps.lanes_f32
        parts = [self._array(), self._by_lane(1)]
        permutes = caps.has_lookup and len(self.values) <= 16
        if permutes and lanes == 16:
            parts.append(self._floats16())
        elif permutes and lanes == 8:
            parts.append(self._floats8())
        elif permutes and lanes == 4:
            parts.append(self._floats4())
        else:
            parts.append(self._by_lane(lanes))
        if caps.has_lane_operands:
            parts.append(self._pairs4())
        elif caps.has_bf16_dot:
            parts.append(self._pairs())
        return "\n".join(parts)

    def floats(self, codes: Any, lanes: int) -> Any:
        """float32 lanes of int32 codes; bits above those of a code are ignored."""
        dtype = "float32" if lanes == 1 else f"float32x{lanes}"
        return T.call_pure_extern(dtype, f"llmc_table_{self.name}_{lanes}", codes)

    def pairs(self, codes: Any) -> Any:
        """Lanes of bf16 pairs; each half word of `codes` holds a code in its lower bits, others are ignored."""
        return T.call_pure_extern(str(codes.ty.dtype), f"llmc_pairs_{self.name}", codes)

    def pairs_of_bytes(self, codes: Any, half: int) -> Any:
        """As `pairs` for a table of 16, of the lower (half 0) or upper (1) bytes of half words, which hold a code alone."""
        return T.call_pure_extern(str(codes.ty.dtype), f"llmc_pairs_{self.name}_{half}", codes)

    def _array(self) -> str:
        size = len(self.values)
        return (
            f"@llmc_table_{self.name} = linkonce_odr unnamed_addr constant [{size} x float] "
            f"[{_floats(self.values)}]"
        )

    def _by_lane(self, lanes: int) -> str:
        size, name = len(self.values), self.name
        if lanes == 1:
            return f"""
define linkonce_odr float @llmc_table_{name}_1(i32 %c) alwaysinline {{
  %i = and i32 %c, {size - 1}
  %p = getelementptr [{size} x float], ptr @llmc_table_{name}, i32 0, i32 %i
  %v = load float, ptr %p
  ret float %v
}}"""
        lines = [
            f"define linkonce_odr <{lanes} x float> @llmc_table_{name}_{lanes}(<{lanes} x i32> %c) noinline {{"
        ]
        before = "poison"
        for i in range(lanes):
            lines += [
                f"  %c{i} = extractelement <{lanes} x i32> %c, i32 {i}",
                f"  %v{i} = call float @llmc_table_{name}_1(i32 %c{i})",
                f"  %r{i} = insertelement <{lanes} x float> {before}, float %v{i}, i32 {i}",
            ]
            before = f"%r{i}"
        return "\n".join([*lines, f"  ret <{lanes} x float> {before}", "}"])

    def _floats16(self) -> str:
        table = _floats(_repeated(self.values, 16))
        return f"""
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
define linkonce_odr <16 x float> @llmc_table_{self.name}_16(<16 x i32> %c) alwaysinline {{
  %r = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <{table}>, <16 x i32> %c)
  ret <16 x float> %r
}}"""

    def _floats8(self) -> str:
        values = _repeated(self.values, 16)
        bit = ", ".join(["i32 8"] * 8)
        return f"""
declare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)
define linkonce_odr <8 x float> @llmc_table_{self.name}_8(<8 x i32> %c) alwaysinline {{
  %low = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{_floats(values[:8])}>, <8 x i32> %c)
  %high = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{_floats(values[8:])}>, <8 x i32> %c)
  %bit = and <8 x i32> %c, <{bit}>
  %is_low = icmp eq <8 x i32> %bit, zeroinitializer
  %r = select <8 x i1> %is_low, <8 x float> %low, <8 x float> %high
  ret <8 x float> %r
}}"""

    def _floats4(self) -> str:
        """A table of 64 bytes, permuted by bytes: element i is bytes 4i to 4i + 3."""
        values = _repeated(self.values, 16)
        parts = [f"bitcast (<4 x float> <{_floats(values[i : i + 4])}> to <16 x i8>)" for i in (0, 4, 8, 12)]
        operands = ", ".join(f"<16 x i8> {p}" for p in parts)

        def lanes(value: int) -> str:
            return "<" + ", ".join([f"i32 {value}"] * 4) + ">"

        return f"""
declare <16 x i8> @llvm.aarch64.neon.tbl4.v16i8(<16 x i8>, <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8>)
define linkonce_odr <4 x float> @llmc_table_{self.name}_4(<4 x i32> %c) alwaysinline {{
  %m = and <4 x i32> %c, {lanes(15)}
  %b = mul <4 x i32> %m, {lanes(0x04040404)}
  %i = add <4 x i32> %b, {lanes(0x03020100)}
  %x = bitcast <4 x i32> %i to <16 x i8>
  %r = call <16 x i8> @llvm.aarch64.neon.tbl4.v16i8({operands}, <16 x i8> %x)
  %f = bitcast <16 x i8> %r to <4 x float>
  ret <4 x float> %f
}}"""

    def _pairs(self) -> str:
        """Values are cut to bf16: the caller uses it only where they are exact in it."""
        words = [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in self.values]
        size = 64 if len(words) == 64 else 32
        halves = [_halves(part.tolist()) for part in np.split(np.resize(words, size), size // 32)]
        declare = "declare <32 x i16> @llvm.x86.avx512"
        if size == 32:
            function, operands = "permvar.hi.512", f"<32 x i16> <{halves[0]}>, <32 x i16> %i"
            declare += ".permvar.hi.512(<32 x i16>, <32 x i16>)"
        else:
            function = "vpermi2var.hi.512"
            operands = f"<32 x i16> <{halves[0]}>, <32 x i16> %i, <32 x i16> <{halves[1]}>"
            declare += ".vpermi2var.hi.512(<32 x i16>, <32 x i16>, <32 x i16>)"
        return f"""
{declare}
define linkonce_odr <16 x i32> @llmc_pairs_{self.name}(<16 x i32> %c) alwaysinline {{
  %i = bitcast <16 x i32> %c to <32 x i16>
  %r = call <32 x i16> @llvm.x86.avx512.{function}({operands})
  %s = bitcast <32 x i16> %r to <16 x i32>
  ret <16 x i32> %s
}}"""

    def _pairs4(self) -> str:
        """As _pairs: upper and lower bytes of the values from a table each, by the lower bytes of the half words."""
        words = [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in self.values]
        size = max(16, len(words))
        mask = _list("i16", len(words) - 1, 8)
        registers = size // 16

        def table(shift: int) -> str:
            values = np.resize([w >> shift & 255 for w in words], size).astype(np.uint8).view(np.int8)
            parts = [", ".join(f"i8 {v}" for v in values[i : i + 16]) for i in range(0, size, 16)]
            return ", ".join(f"<16 x i8> <{part}>" for part in parts)

        tbl = f"llvm.aarch64.neon.tbl{registers}.v16i8"

        def function(name: str, masked: bool, half: int) -> str:
            taken = ", ".join(f"i32 {i}, i32 {i + 16}" for i in range(half, 16, 2))
            clean = f"and <8 x i16> %h, <{mask}>" if masked else f"or <8 x i16> %h, <{_list('i16', 0, 8)}>"
            return f"""
define linkonce_odr <4 x i32> @llmc_pairs_{name}(<4 x i32> %c) alwaysinline {{
  %h = bitcast <4 x i32> %c to <8 x i16>
  %m = {clean}
  %i = bitcast <8 x i16> %m to <16 x i8>
  %low = call <16 x i8> @{tbl}({table(0)}, <16 x i8> %i)
  %high = call <16 x i8> @{tbl}({table(8)}, <16 x i8> %i)
  %r = shufflevector <16 x i8> %low, <16 x i8> %high, <16 x i32> <{taken}>
  %s = bitcast <16 x i8> %r to <4 x i32>
  ret <4 x i32> %s
}}"""

        parts = [f"declare <16 x i8> @{tbl}({', '.join(['<16 x i8>'] * (registers + 1))})"]
        parts.append(function(self.name, True, 0))
        if len(words) == 16:
            parts += [function(f"{self.name}_{half}", False, half) for half in (0, 1)]
        return "\n".join(parts)


def _list(kind: str, value: int, count: int) -> str:
    return ", ".join([f"{kind} {value}"] * count)


def _repeated(values: Sequence[float], size: int) -> tuple[float, ...]:
    return tuple(float(v) for v in np.resize(values, size))


def _floats(values: Sequence[float]) -> str:
    """LLVM writes a float constant as the bits of the double that equals it."""
    bits = [struct.unpack("<Q", struct.pack("<d", float(np.float32(v))))[0] for v in values]
    return ", ".join(f"float 0x{b:016X}" for b in bits)


def _halves(words: Sequence[int]) -> str:
    return ", ".join(f"i16 {int(np.int16(np.uint16(w)))}" for w in words)
