"""Sums of products of bytes in 32-bit lanes: one form per kind of machine, the same integers from all of them.

As LLVM text: TVM has no names for these instructions, and its own integer additions promise not to overflow, which
partial sums may do. All arithmetic is modulo 2**32, so a sum is exact whenever its final value fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import ByteDot, Capabilities
from llmc.schedules import emit as e

SHORT = 8  # additions of two products that a 16-bit sum holds


class IntDot:
    """acc[lane] += sum over b < 4 of weight byte b * activation byte b.

    Vectors are int32 lanes of four bytes each. Weights are codes of `bits` bits in bytes, unsigned; activations are int8.
    What is added is that of ``code - 2**(bits-1)`` up to ``offset`` times the sum of the activations, which the caller
    subtracts.

    Where two products of a 4-bit code fit into 16 bits, so do the sums of SHORT calls of ``add``: they begin with zero and
    go to 32 bits together, by ``settle`` (`in_words`).

    Attributes:
        offset: see above; 0 where the machine multiplies signed weights.
        in_words: whether ``add`` gives sums of 16 bits.
    """

    def __init__(self, caps: Capabilities, bits: int) -> None:
        self.caps, self.bits, self.lanes = caps, bits, caps.lanes_f32
        # a code of 4 bits is a signed byte as it is
        self._signed = caps.byte_dot is ByteDot.SIGNED and bits == 8
        self.offset = 0 if self._signed else 1 << (bits - 1)
        words = caps.byte_dot is ByteDot.WORDS
        # 255 * 127 * 2 does not fit into the 16-bit sums of vpmaddubsw, 15 * 127 * 2 does
        self._split = words and bits == 8
        self.in_words = words and bits == 4
        self.name = f"llmc_dot{bits}_{caps.byte_dot.value}_{self.lanes}"

    @property
    def registers(self) -> int:
        """Vectors that one vector of weights is held as."""
        return 2 if self._split else 4 if self.caps.byte_dot is ByteDot.NONE else 1

    def import_text(self) -> dict[str, Any]:
        """Annotations for one loop of a kernel that uses this object; with the functions of llmc.schedules.emit."""
        text = str(e.import_text(self.caps).get("pragma_import_llvm", ""))
        return {"pragma_import_llvm": text + self._text()}

    def weights(self, word: Any) -> list[Any]:
        """A vector of codes as `add` takes it; the results are named."""
        if self._signed:
            return [e.let(T.bitwise_xor(word, e.const("int32", -0x7F7F7F80, self.lanes)))]
        if self._split:
            return self._words(word, "u")
        if self.caps.byte_dot is ByteDot.NONE:
            return [e.let(self._byte(word, b, "lshr")) for b in range(4)]
        return [word]

    def activations(self, quad: Any) -> list[Any]:
        """Four int8 in an int32 scalar, spread over the lanes, as `add` takes it; the results are named."""
        vector = e.let(e.splat(quad, self.lanes))
        if self._split:
            return self._words(vector, "s")
        if self.caps.byte_dot is ByteDot.NONE:
            return [e.let(self._byte(vector, b, "ashr")) for b in range(4)]
        return [vector]

    def settle(self, acc: Any, short: Any) -> Any:
        """acc plus 16-bit sums."""
        return T.call_pure_extern(self._type, f"{self.name}_settle", acc, short)

    def add(self, acc: Any, weights: Sequence[Any], activations: Sequence[Any]) -> Any:
        """acc plus the products."""
        for w, a in zip(weights, activations, strict=True):
            acc = T.call_pure_extern(self._type, self.name, acc, w, a)
        return acc

    @property
    def _type(self) -> str:
        return e.vec("int32", self.lanes)

    def _words(self, vector: Any, sign: str) -> list[Any]:
        """Bytes 0 and 2, then 1 and 3, as 16-bit words."""
        parts = ("even", "odd")
        return [e.let(T.call_pure_extern(self._type, f"{self.name}_{p}_{sign}", vector)) for p in parts]

    def _byte(self, vector: Any, b: int, shift: str) -> Any:
        return T.call_pure_extern(self._type, f"{self.name}_byte{b}_{shift}", vector)

    def _text(self) -> str:
        lanes = self.lanes
        return {
            ByteDot.UNSIGNED_SIGNED: self._bytes_text,
            ByteDot.SIGNED: self._bytes_text,
            ByteDot.WORDS: self._words_text if self._split else self._nibbles_text,
            ByteDot.NONE: self._plain_text,
        }[self.caps.byte_dot](f"<{lanes} x i32>", f"<{lanes * 2} x i16>", f"<{lanes * 4} x i8>")

    def _bytes_text(self, lane: str, word: str, byte: str) -> str:
        """One instruction, of the width of a register."""
        intrinsic = {
            (ByteDot.UNSIGNED_SIGNED, 16): "llvm.x86.avx512.vpdpbusd.512",
            (ByteDot.UNSIGNED_SIGNED, 8): "llvm.x86.avx512.vpdpbusd.256",
            (ByteDot.SIGNED, 4): "llvm.aarch64.neon.sdot.v4i32.v16i8",
        }[self.caps.byte_dot, self.lanes]
        return f"""
declare {lane} @{intrinsic}({lane}, {byte}, {byte})
define linkonce_odr {lane} @{self.name}({lane} %c, {lane} %w, {lane} %a) alwaysinline {{
  %x = bitcast {lane} %w to {byte}
  %y = bitcast {lane} %a to {byte}
  %r = call {lane} @{intrinsic}({lane} %c, {byte} %x, {byte} %y)
  ret {lane} %r
}}
"""

    def _words_text(self, lane: str, word: str, byte: str) -> str:
        madd = _MADD_WORDS[self.lanes]
        eights = _splat("i16", 8, 2 * self.lanes)
        low = _splat("i16", 255, 2 * self.lanes)

        def function(name: str, *lines: str) -> str:
            body = "\n".join(f"  {line}" for line in lines)
            return f"""
define linkonce_odr {lane} @{self.name}_{name}({lane} %v) alwaysinline {{
  %x = bitcast {lane} %v to {word}
{body}
  %r = bitcast {word} %y to {lane}
  ret {lane} %r
}}
"""

        return (
            function("even_u", f"%y = and {word} %x, {low}")
            + function("odd_u", f"%y = lshr {word} %x, {eights}")
            + function("even_s", f"%z = shl {word} %x, {eights}", f"%y = ashr {word} %z, {eights}")
            + function("odd_s", f"%y = ashr {word} %x, {eights}")
            + f"""
declare {lane} @{madd}({word}, {word})
define linkonce_odr {lane} @{self.name}({lane} %c, {lane} %w, {lane} %a) alwaysinline {{
  %x = bitcast {lane} %w to {word}
  %y = bitcast {lane} %a to {word}
  %p = call {lane} @{madd}({word} %x, {word} %y)
  %r = add {lane} %c, %p
  ret {lane} %r
}}
"""
        )

    def _nibbles_text(self, lane: str, word: str, byte: str) -> str:
        """Products of a code of 4 bits with an int8: two are at most 3810, and SHORT times that fit into 16 bits."""
        madd, maddubs = _MADD_WORDS[self.lanes], _MADD_BYTES[self.lanes]
        return f"""
declare {lane} @{madd}({word}, {word})
declare {word} @{maddubs}({byte}, {byte})
define linkonce_odr {lane} @{self.name}({lane} %c, {lane} %w, {lane} %a) alwaysinline {{
  %x = bitcast {lane} %w to {byte}
  %y = bitcast {lane} %a to {byte}
  %p = call {word} @{maddubs}({byte} %x, {byte} %y)
  %s = bitcast {lane} %c to {word}
  %t = add {word} %s, %p
  %r = bitcast {word} %t to {lane}
  ret {lane} %r
}}
define linkonce_odr {lane} @{self.name}_settle({lane} %c, {lane} %v) alwaysinline {{
  %x = bitcast {lane} %v to {word}
  %q = call {lane} @{madd}({word} %x, {word} {_splat("i16", 1, 2 * self.lanes)})
  %r = add {lane} %c, %q
  ret {lane} %r
}}
"""

    def _plain_text(self, lane: str, word: str, byte: str) -> str:
        parts = []
        for shift in ("lshr", "ashr"):
            for b in range(4):
                up, down = (_splat("i32", n, self.lanes) for n in (24 - 8 * b, 24))
                parts.append(f"""
define linkonce_odr {lane} @{self.name}_byte{b}_{shift}({lane} %v) alwaysinline {{
  %x = shl {lane} %v, {up}
  %r = {shift} {lane} %x, {down}
  ret {lane} %r
}}
""")
        return (
            "".join(parts)
            + f"""
define linkonce_odr {lane} @{self.name}({lane} %c, {lane} %w, {lane} %a) alwaysinline {{
  %p = mul {lane} %w, %a
  %r = add {lane} %c, %p
  ret {lane} %r
}}
"""
        )


_MADD_WORDS = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
_MADD_BYTES = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}


def _splat(kind: str, value: int, count: int) -> str:
    return "<" + ", ".join([f"{kind} {value}"] * count) + ">"
