"""Elements of cache pages as 8-bit codes: values of codes, and codes and scales of a token's key or value.

Symmetric: the scale of a token's key in one cached head is its largest element's size over the largest code, rounded to
bfloat16; codes are taken against the rounded scale, so that rounding it costs nothing. What is not finite makes its scale
not finite, and with it everything that is computed from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.kv_plan import CODE_RANGE, QUAD, SCALE_DTYPE, SMALLEST_SCALE, padded
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_pools import Pools
from llmc.schedules.norm import along
from llmc.schedules.vmath import round_even

E4M3 = "float8_e4m3fn"
# what code_values lacks: an e4m3 number moved into a float16 is so many times too small (exponent biases 7 and 15)
CODE_FACTOR = {"int8": 1.0, E4M3: 2.0**8}
BIAS = 128  # added to a code of int8 where it is stored
_BIAS_OF_WORD = 0x80808080 - (1 << 32)
_E4M3_IN_F32 = 0x87F00000 - (1 << 32)
_LARGEST = 3.4e38
_E4M3_SMALLEST_NORMAL = 121 << 23  # 2^-6, as bits of a float32
_E4M3_BIAS = 120 << 3  # between the exponents of a float32 and of an e4m3


def code_values(codes: Any, dtype: str, lanes: int) -> Any:
    """float32 of signed bytes that hold codes (of int8 without BIAS), without CODE_FACTOR; exact."""
    if dtype == "int8":
        return tirx.Cast(e.vec("float32", lanes), tirx.Cast(e.vec("int32", lanes), codes))
    wide = T.shift_left(tirx.Cast(e.vec("int16", lanes), codes), e.const("int16", 7, lanes))
    # the sign was extended into the bit below the float16's sign as well
    half = T.bitwise_and(wide, e.const("int16", -0x4001, lanes))
    return tirx.Cast(e.vec("float32", lanes), T.reinterpret(e.vec("float16", lanes), half))


def word_values(words: Any, byte: int, dtype: str, lanes: int) -> Any:
    """float32 of the codes in byte `byte` (0 = lowest) of int32 lanes; exact."""
    i32 = lambda value: e.const("int32", value, lanes)  # noqa: E731
    if dtype == "int8":
        words = T.bitwise_xor(words, i32(_BIAS_OF_WORD))
    top = words if byte == 3 else T.shift_left(words, i32(24 - 8 * byte))
    if dtype == "int8":
        return tirx.Cast(e.vec("float32", lanes), T.shift_right(top, i32(24)))
    # sign, exponent and mantissa at their places in a float32; the sign was extended into bits that are cleared
    bits = T.bitwise_and(T.shift_right(top, i32(4)), i32(_E4M3_IN_F32))
    return T.reinterpret(e.vec("float32", lanes), bits) * e.splat(2.0**120, lanes)


def code_of_zero(dtype: str) -> int:
    """As it is stored."""
    return BIAS if dtype == "int8" else 0


def magnitude_bits(x: Any, lanes: int) -> Any:
    """Bits of |x| as int32: in the order of the numbers, infinity and NaN above all."""
    return T.bitwise_and(T.reinterpret(e.vec("int32", lanes), x), e.const("int32", 0x7FFFFFFF, lanes))


def scale_of(largest: Any, dtype: str, caps: Capabilities) -> tuple[Any, Any, Any]:
    """(bits of the scale, divisor, whether there is something to divide) for the largest |x| of a row (NaN: not finite)."""
    bits = e.let(e.narrow(e.let(largest / e.f32(CODE_RANGE[dtype])), SCALE_DTYPE, 1, caps))
    scale = e.let(e.widen(bits, SCALE_DTYPE, 1))
    usable = e.let(T.And(scale >= e.f32(SMALLEST_SCALE), scale <= e.f32(_LARGEST)))
    stored = tirx.Select(scale < e.f32(SMALLEST_SCALE), tirx.Cast("uint16", e.const("int32", 0, 1)), bits)
    return e.let(stored), e.let(tirx.Select(usable, scale, e.f32(1.0))), usable


def codes_of(quotients: Any, dtype: str, lanes: int, to_even: Callable[[Any, int], Any] = round_even) -> Any:
    """Stored codes as int32 of row elements over their scale, rounded to nearest even by `to_even`.

    A quotient is at most CODE_RANGE within the rounding of the scale, which never makes it the next code.
    """
    i32 = e.vec("int32", lanes)
    if dtype == "int8":
        return tirx.Cast(i32, to_even(quotients, lanes)) + e.const("int32", BIAS, lanes)
    x = e.let(quotients)
    bits = e.let(T.reinterpret(i32, x))
    size = e.let(magnitude_bits(x, lanes))
    odd = T.bitwise_and(T.shift_right(size, e.const("int32", 20, lanes)), e.const("int32", 1, lanes))
    rounded = T.shift_right(size + e.const("int32", 0x7FFFF, lanes) + odd, e.const("int32", 20, lanes))
    normal = rounded - e.const("int32", _E4M3_BIAS, lanes)
    # below, steps are 2^-9
    steps = to_even(T.reinterpret(e.vec("float32", lanes), size) * e.splat(2.0**9, lanes), lanes)
    small = size < e.const("int32", _E4M3_SMALLEST_NORMAL, lanes)
    sign = T.bitwise_and(T.shift_right(bits, e.const("int32", 24, lanes)), e.const("int32", 0x80, lanes))
    return T.bitwise_or(tirx.Select(small, tirx.Cast(i32, steps), normal), sign)


def largest_magnitude(line: Any, first: Any, dim: int, caps: Capabilities) -> Any:
    """max |line[first + i]| over i < dim, float32; NaN if there is one, else infinity if there is one."""
    lanes = caps.lanes_f32
    top, rest = e.scratch(lanes, "int32"), e.scratch(1, "int32")
    e.store(top, 0, e.const("int32", 0, lanes), lanes)
    e.store(rest, 0, e.const("int32", 0, 1), 1)

    def larger(at: Any, n: int) -> None:
        into = rest if n == 1 else top
        e.store(into, 0, T.max(e.some(into, 0, n), magnitude_bits(e.some(line, first + at, n), n)), n)

    along(dim, caps, larger)
    bits = T.max(rest[0], e.fold(e.load(top, 0, lanes), lanes, T.max, "int32"))
    return e.let(T.reinterpret("float32", e.let(bits)))


def encode(line: Any, dim: int, dtype: str, caps: Capabilities) -> tuple[Any, Any]:
    """(stored codes as uint8 workspace, padded to words; bits of the scale) of a key or value: line[:dim], float32."""
    scale, divisor, usable = scale_of(largest_magnitude(line, 0, dim, caps), dtype, caps)
    codes = e.workspace(padded(dim), "uint8")

    def code(at: Any, n: int) -> None:
        value = tirx.Select(e.splat(usable, n), e.some(line, at, n), e.splat(0.0, n))
        found = codes_of(e.let(value / e.splat(divisor, n)), dtype, n)
        e.store(codes, at, tirx.Cast(e.vec("uint8", n), found), n)

    along(dim, caps, code)
    for at in range(dim, padded(dim)):
        e.store(codes, at, tirx.Cast("uint8", e.const("int32", code_of_zero(dtype), 1)), 1)
    return codes, scale


class HeadWriter:
    """Writes one cached head's key and value of a token to its slot.

    Args:
        slot: page * page_size + offset, int64.
    """

    def __init__(
        self, cfg: AttentionConfig, caps: Capabilities, pools: Pools, slot: Any, layer: Any, head: Any
    ) -> None:
        self.cfg, self.caps, self.pools = cfg, caps, pools
        self._part = e.let((slot // cfg.page_size * cfg.layers + layer) * cfg.kv_heads + head)
        self._offset = e.let(slot % cfg.page_size)

    def key(self, element: Callable[[Any], Any]) -> None:
        """element(d) is element d of the key, in the pool's type; they lie a page apart each: scattered."""
        base = e.let(self._part * self.cfg.k_part + self._offset)
        with e.loop(self.cfg.key_dim) as d:
            e.store(self.pools.k, base + d * self.cfg.page_size, element(d), 1)

    def value(self, each: Callable[[Callable[[Any, Any, int], None]], None]) -> None:
        """each(store) stores all elements of the value, in the pool's type: store(first, values, lanes)."""
        base = e.let(self._part * self.cfg.v_part + self._offset * self.cfg.value_dim)
        each(lambda first, values, lanes: e.store(self.pools.v, base + first, values, lanes))

    def coded_key(self, line: Any) -> None:
        """The key line[:key_dim], float32, to coded pages."""
        cfg = self.cfg
        codes, scale = encode(line, cfg.key_dim, cfg.kv_dtype, self.caps)
        words = e.flat(codes, padded(cfg.key_dim) // QUAD, "int32")
        base = e.let(self._part * (cfg.k_part // QUAD) + self._offset)
        with e.loop(padded(cfg.key_dim) // QUAD) as i:
            e.store(self.pools.k_words, base + i * cfg.page_size, words[i], 1)
        scales, first = self.pools.key_scales(self._part)
        e.store(scales, first + self._offset, scale, 1)

    def coded_value(self, line: Any) -> None:
        """The value line[:value_dim], float32, to coded pages."""
        cfg = self.cfg
        codes, scale = encode(line, cfg.value_dim, cfg.kv_dtype, self.caps)
        row = self._offset // QUAD * (padded(cfg.value_dim) * QUAD) + self._offset % QUAD
        base = e.let(self._part * cfg.v_part + row)
        with e.loop(cfg.value_dim) as d:
            e.store(self.pools.v, base + d * QUAD, codes[d], 1)
        scales, first = self.pools.value_scales(self._part)
        e.store(scales, first + self._offset, scale, 1)
