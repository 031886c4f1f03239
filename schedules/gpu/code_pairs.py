"""Codes of cache pages as pairs of 16-bit numbers for the matrix units: by bit operations, exact, on every architecture.

A byte moved into a 16-bit number is that number up to a constant that one fma takes away (int8, which is stored with 128
added), or a power of two that one fma puts back (e4m3). Architectures from sm_89 on convert e4m3 to f16 in one instruction,
but make NaN of two bytes; memory that was never written may hold those, and 0 * NaN is no zero.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g

_TYPES = {"bfloat16": "bf16", "float16": "f16"}
_KINDS = {"int8": "int8", "float8_e4m3fn": "e4m3"}
# what __byte_perm picks for each pair: bytes of the word to the lower, or upper, halves of 16 bits
_LOW, _HIGH = (0x4140, 0x4342), (0x1404, 0x3424)
_FUNCTION = """
__device__ __forceinline__ unsigned llmc_codes_NAME(unsigned word, unsigned picked) {
  unsigned d, h = __byte_perm(word, FILL, picked);
  asm("fma.rn.TYPEx2 %0, %1, %2, %3;" : "=r"(d) : "r"(A), "r"(B), "r"(C));
  return d;
}
"""
# (codes, type) -> (bytes beside those picked, a, b, c): a * b + c of both halves
_TERMS = {
    # 1024 + u, less 1152
    ("int8", "f16"): ("0x64646464", "h", "0x3C003C00u", "0xE480E480u"),
    # 128 + the lower seven bits, less 128 if the upper one is set, else 256
    ("int8", "bf16"): (
        "0",
        "(h & 0x007F007Fu) | 0x43004300u",
        "0x3F803F80u",
        "(h & 0x00800080u) ^ 0xC380C380u",
    ),
    # exponents have a bias of 7 instead of 15, and of 127
    ("e4m3", "f16"): ("0", "((h >> 1) & 0x3F803F80u) | (h & 0x80008000u)", "0x5C005C00u", "0x80008000u"),
    ("e4m3", "bf16"): ("0", "((h >> 4) & 0x07F007F0u) | (h & 0x80008000u)", "0x7B807B80u", "0x80008000u"),
}


def code_pair(word: Any, pair: int, kv_dtype: str, dtype: str) -> Any:
    """Codes 2 * pair and the next one of a word of four (uint32), without the scale, as a pair of `dtype` (uint32)."""
    kind, to = _KINDS[kv_dtype], _TYPES[dtype]
    fill, a, b, c = _TERMS[kind, to]
    source = _FUNCTION.replace("NAME", f"{kind}_{to}").replace("TYPE", to).replace("FILL", fill)
    source = (
        source.replace('"r"(A)', f'"r"({a})').replace('"r"(B)', f'"r"({b})').replace('"r"(C)', f'"r"({c})')
    )
    picked = g.u32((_LOW if kind == "int8" else _HIGH)[pair])
    return e.let(g.device_call(f"llmc_codes_{kind}_{to}", source, word, picked, result="uint32"))
