"""Instructions that TIR has no words for, as LLVM text; every function is inlined by LLVM.

On bf16 also because TVM's own legalisation would change the operand types of the intrinsics. A pair is two bf16 in a
32-bit lane, the lower half first.

    llmc_dot_bf16(c, a, b)   c + even(a) * even(b) + odd(a) * odd(b), per lane
    llmc_narrow_bf16(a)      float32 to bf16, rounded to nearest even
    llmc_narrow2_bf16(a, b)  the same for two vectors, one behind the other, as pairs
    llmc_zip(a, b)           pairs (a[i], b[i])
    llmc_zip_first(a, b)     the same of the first half of two vectors of twice as many elements; llmc_zip_second: the other
    llmc_mma_bf16(c, a, b)   2 x 2 tile c + 2 x 4 tile a times 2 x 4 tile b transposed (where the machine has it)
    llmc_mma_bytes(c, a, b)  the same with 2 x 8 tiles of signed bytes and 32-bit sums
    llmc_half_low(c, a, b)   c + the lower four lanes of float16 a * b in float32; llmc_half_high: the upper four
    llmc_join, zip_low, ...  what brings operands of the latter two together: see matrix_tile.py
"""

from __future__ import annotations

from llmc.caps import Capabilities

_ZIP_WIDE = """
define linkonce_odr <L x i32> @llmc_zip_NAME(<D x i16> %a, <D x i16> %b) alwaysinline {
  %r = shufflevector <D x i16> %a, <D x i16> %b, <D x i32> <ZIP>
  %s = bitcast <D x i16> %r to <L x i32>
  ret <L x i32> %s
}
"""
_COMMON = """
define linkonce_odr <L x i32> @llmc_zip(<L x i16> %a, <L x i16> %b) alwaysinline {
  %r = shufflevector <L x i16> %a, <L x i16> %b, <D x i32> <ZIP>
  %s = bitcast <D x i16> %r to <L x i32>
  ret <L x i32> %s
}
define linkonce_odr <L x float> @llmc_dot_bf16(<L x float> %c, <L x i32> %a, <L x i32> %b) alwaysinline {
  %x = bitcast <L x i32> %a to <D x bfloat>
  %y = bitcast <L x i32> %b to <D x bfloat>
  %r = call <L x float> @DOT(<L x float> %c, <D x bfloat> %x, <D x bfloat> %y)
  ret <L x float> %r
}
declare <L x float> @DOT(<L x float>, <D x bfloat>, <D x bfloat>)
"""
_X86 = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr <16 x i16> @llmc_narrow_bf16(<16 x float> %a) alwaysinline {
  %r = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %a)
  %s = bitcast <16 x bfloat> %r to <16 x i16>
  ret <16 x i16> %s
}
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define linkonce_odr <16 x i32> @llmc_narrow2_bf16(<16 x float> %lo, <16 x float> %hi) alwaysinline {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %hi, <16 x float> %lo)
  %s = bitcast <32 x bfloat> %r to <16 x i32>
  ret <16 x i32> %s
}
"""
# bfcvtn and bfcvtn2, by their general names
_ARM = """
define linkonce_odr <4 x i16> @llmc_narrow_bf16(<4 x float> %a) alwaysinline {
  %r = fptrunc <4 x float> %a to <4 x bfloat>
  %s = bitcast <4 x bfloat> %r to <4 x i16>
  ret <4 x i16> %s
}
define linkonce_odr <4 x i32> @llmc_narrow2_bf16(<4 x float> %lo, <4 x float> %hi) alwaysinline {
  %x = fptrunc <4 x float> %lo to <4 x bfloat>
  %y = fptrunc <4 x float> %hi to <4 x bfloat>
  %r = shufflevector <4 x bfloat> %x, <4 x bfloat> %y, <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %s = bitcast <8 x bfloat> %r to <4 x i32>
  ret <4 x i32> %s
}
"""
_ARM_MATRIX = """
declare <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define linkonce_odr <4 x float> @llmc_mma_bf16(<4 x float> %c, <4 x i32> %a, <4 x i32> %b) alwaysinline {
  %x = bitcast <4 x i32> %a to <8 x bfloat>
  %y = bitcast <4 x i32> %b to <8 x bfloat>
  %r = call <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float> %c, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %r
}
"""
_BYTE_MATRIX = """
declare <4 x i32> @llvm.aarch64.neon.smmla.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
define linkonce_odr <4 x i32> @llmc_mma_bytes(<4 x i32> %c, <4 x i32> %a, <4 x i32> %b) alwaysinline {
  %x = bitcast <4 x i32> %a to <16 x i8>
  %y = bitcast <4 x i32> %b to <16 x i8>
  %r = call <4 x i32> @llvm.aarch64.neon.smmla.v4i32.v16i8(<4 x i32> %c, <16 x i8> %x, <16 x i8> %y)
  ret <4 x i32> %r
}
"""
_HALVES = """
declare <4 x float> @llvm.aarch64.neon.INTRINSIC.v4f32.v8f16(<4 x float>, <8 x half>, <8 x half>)
define linkonce_odr <4 x float> @llmc_half_NAME(<4 x float> %c, <8 x half> %a, <8 x half> %b) alwaysinline {
  %r = call <4 x float> @llvm.aarch64.neon.INTRINSIC.v4f32.v8f16(<4 x float> %c, <8 x half> %a, <8 x half> %b)
  ret <4 x float> %r
}
"""
_JOIN = """
define linkonce_odr <4 x i32> @llmc_join(<2 x i32> %a, <2 x i32> %b) alwaysinline {
  %r = shufflevector <2 x i32> %a, <2 x i32> %b, <4 x i32> <i32 0, i32 1, i32 2, i32 3>
  ret <4 x i32> %r
}
"""
# name -> lanes of two registers, one behind the other
_SHUFFLES = {
    "zip_low": (0, 4, 1, 5),
    "zip_high": (2, 6, 3, 7),
    "lower": (0, 1, 4, 5),
    "upper": (2, 3, 6, 7),
}
# lanes -> (the dot product, what is special)
_BY_LANES = {
    16: ("llvm.x86.avx512bf16.dpbf16ps.512", _X86),
    4: ("llvm.aarch64.neon.bfdot.v4f32.v8bf16", _ARM),
}


def llvm_text(caps: Capabilities) -> str:
    """Those of the functions above that a machine has; "" = none."""
    return _bf16_text(caps) + _matrix_text(caps) + _halves_text(caps)


def _halves_text(caps: Capabilities) -> str:
    if not caps.has_f16_fma:
        return ""
    names = {"low": "fmlal", "high": "fmlal2"}
    return "".join(
        _HALVES.replace("INTRINSIC", intrinsic).replace("NAME", name) for name, intrinsic in names.items()
    )


def _bf16_text(caps: Capabilities) -> str:
    if not caps.has_bf16_dot:
        return ""
    lanes = caps.lanes_f32
    dot, special = _BY_LANES[lanes]
    text = _COMMON.replace("DOT", dot).replace("ZIP", _zipped(range(lanes), lanes))
    for name, start in (("first", 0), ("second", lanes)):
        mask = _zipped(range(start, start + lanes), 2 * lanes)
        text += _ZIP_WIDE.replace("NAME", name).replace("ZIP", mask)
    return text.replace("<L x", f"<{lanes} x").replace("<D x", f"<{2 * lanes} x") + special


def _zipped(places: range, length: int) -> str:
    """A mask of `shufflevector`: elements at some places of two vectors of a length, in turns."""
    return ", ".join(f"i32 {i}, i32 {i + length}" for i in places)


def _matrix_text(caps: Capabilities) -> str:
    parts = [_ARM_MATRIX] if caps.has_bf16_mma else []
    parts += [_BYTE_MATRIX] if caps.has_byte_mma else []
    if not parts:
        return ""
    for name, lanes in _SHUFFLES.items():
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        parts.append(f"""
define linkonce_odr <4 x i32> @llmc_{name}(<4 x i32> %a, <4 x i32> %b) alwaysinline {{
  %r = shufflevector <4 x i32> %a, <4 x i32> %b, <4 x i32> <{mask}>
  ret <4 x i32> %r
}}
""")
    return "".join([*parts, _JOIN])
