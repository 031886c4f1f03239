"""Tile operations as LLVM functions on a tile file in memory: what schedules/tiles.py calls where no unit is to be used.

A tile file is 8 tiles of 16 rows by 64 bytes, behind them the 64 bytes of configuration. Every function takes it first.
What the processor faults on (no configuration, a wrong one, operands whose sizes do not fit) traps. Not emulated: that the unit
takes denormal numbers for zeros.
"""

from __future__ import annotations

from functools import cache

CONFIG_AT = 8 * 1024
FILE_BYTES = CONFIG_AT + 64


@cache
def emulation_text() -> str:
    """The functions, LLVM text."""
    dots = [_DOT_BF16] + [_dot_bytes(f"b{a}{b}d", a == "s", b == "s") for a, b in (("s", "s"), ("s", "u"))]
    return _COMMON + "".join(dots)


_COMMON = f"""
declare void @llvm.trap()
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @free(ptr)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)

define linkonce_odr i64 @llmc_tile_rows(ptr %f, i64 %t) alwaysinline {{
  %o = add i64 %t, {CONFIG_AT + 48}
  %p = getelementptr i8, ptr %f, i64 %o
  %b = load i8, ptr %p
  %r = zext i8 %b to i64
  ret i64 %r
}}
define linkonce_odr i64 @llmc_tile_bytes(ptr %f, i64 %t) alwaysinline {{
  %d = shl i64 %t, 1
  %o = add i64 %d, {CONFIG_AT + 16}
  %p = getelementptr i8, ptr %f, i64 %o
  %b = load i16, ptr %p
  %r = zext i16 %b to i64
  ret i64 %r
}}
define linkonce_odr void @llmc_tile_check(i1 %ok) alwaysinline {{
  br i1 %ok, label %good, label %bad
bad:
  call void @llvm.trap()
  unreachable
good:
  ret void
}}
define linkonce_odr void @llmc_tile_configured(ptr %f) alwaysinline {{
  %p = getelementptr i8, ptr %f, i64 {CONFIG_AT}
  %b = load i8, ptr %p
  %ok = icmp eq i8 %b, 1
  call void @llmc_tile_check(i1 %ok)
  ret void
}}
define linkonce_odr ptr @llmc_tile_at(ptr %f, i64 %t) alwaysinline {{
  %o = shl i64 %t, 10
  %p = getelementptr i8, ptr %f, i64 %o
  ret ptr %p
}}
define linkonce_odr i32 @llmc_ldtilecfg(ptr %f, ptr %c) {{
  %p = getelementptr i8, ptr %f, i64 {CONFIG_AT}
  call void @llvm.memset.p0.i64(ptr %f, i8 0, i64 {CONFIG_AT}, i1 false)
  call void @llvm.memcpy.p0.p0.i64(ptr %p, ptr %c, i64 64, i1 false)
  call void @llmc_tile_configured(ptr %f)
  br label %loop
loop:
  %t = phi i64 [0, %0], [%n, %loop]
  %r = call i64 @llmc_tile_rows(ptr %f, i64 %t)
  %b = call i64 @llmc_tile_bytes(ptr %f, i64 %t)
  %r1 = icmp ule i64 %r, 16
  %b1 = icmp ule i64 %b, 64
  %ok = and i1 %r1, %b1
  call void @llmc_tile_check(i1 %ok)
  %n = add i64 %t, 1
  %more = icmp ult i64 %n, 8
  br i1 %more, label %loop, label %done
done:
  ret i32 0
}}
define linkonce_odr i32 @llmc_tilerelease(ptr %f) {{
  %p = getelementptr i8, ptr %f, i64 {CONFIG_AT}
  call void @llvm.memset.p0.i64(ptr %p, i8 0, i64 64, i1 false)
  ret i32 0
}}
define linkonce_odr i32 @llmc_tile_free(ptr %f) {{
  call void @free(ptr %f)
  ret i32 0
}}
define linkonce_odr i32 @llmc_tilezero(ptr %f, i64 %t) {{
  call void @llmc_tile_configured(ptr %f)
  %d = call ptr @llmc_tile_at(ptr %f, i64 %t)
  call void @llvm.memset.p0.i64(ptr %d, i8 0, i64 1024, i1 false)
  ret i32 0
}}
define linkonce_odr i32 @llmc_tileloadd64(ptr %f, i64 %t, ptr %s, i64 %stride) {{
  %z = call i32 @llmc_tilezero(ptr %f, i64 %t)
  %d = call ptr @llmc_tile_at(ptr %f, i64 %t)
  %rows = call i64 @llmc_tile_rows(ptr %f, i64 %t)
  %bytes = call i64 @llmc_tile_bytes(ptr %f, i64 %t)
  br label %loop
loop:
  %r = phi i64 [0, %0], [%n, %loop]
  %so = mul i64 %r, %stride
  %do = shl i64 %r, 6
  %sp = getelementptr i8, ptr %s, i64 %so
  %dp = getelementptr i8, ptr %d, i64 %do
  call void @llvm.memcpy.p0.p0.i64(ptr %dp, ptr %sp, i64 %bytes, i1 false)
  %n = add i64 %r, 1
  %more = icmp ult i64 %n, %rows
  br i1 %more, label %loop, label %done
done:
  ret i32 0
}}
define linkonce_odr i32 @llmc_tilestored64(ptr %f, i64 %t, ptr %s, i64 %stride) {{
  call void @llmc_tile_configured(ptr %f)
  %d = call ptr @llmc_tile_at(ptr %f, i64 %t)
  %rows = call i64 @llmc_tile_rows(ptr %f, i64 %t)
  %bytes = call i64 @llmc_tile_bytes(ptr %f, i64 %t)
  br label %loop
loop:
  %r = phi i64 [0, %0], [%n, %loop]
  %so = mul i64 %r, %stride
  %do = shl i64 %r, 6
  %sp = getelementptr i8, ptr %s, i64 %so
  %dp = getelementptr i8, ptr %d, i64 %do
  call void @llvm.memcpy.p0.p0.i64(ptr %sp, ptr %dp, i64 %bytes, i1 false)
  %n = add i64 %r, 1
  %more = icmp ult i64 %n, %rows
  br i1 %more, label %loop, label %done
done:
  ret i32 0
}}
define linkonce_odr void @llmc_tile_operands(ptr %f, i64 %c, i64 %a, i64 %b) alwaysinline {{
  call void @llmc_tile_configured(ptr %f)
  %cr = call i64 @llmc_tile_rows(ptr %f, i64 %c)
  %cb = call i64 @llmc_tile_bytes(ptr %f, i64 %c)
  %ar = call i64 @llmc_tile_rows(ptr %f, i64 %a)
  %ab = call i64 @llmc_tile_bytes(ptr %f, i64 %a)
  %br = call i64 @llmc_tile_rows(ptr %f, i64 %b)
  %bb = call i64 @llmc_tile_bytes(ptr %f, i64 %b)
  %m = icmp eq i64 %cr, %ar
  call void @llmc_tile_check(i1 %m)
  %n = icmp eq i64 %cb, %bb
  call void @llmc_tile_check(i1 %n)
  %inner = shl i64 %br, 2
  %k = icmp eq i64 %ab, %inner
  call void @llmc_tile_check(i1 %k)
  %x = icmp ne i64 %c, %a
  call void @llmc_tile_check(i1 %x)
  %y = icmp ne i64 %c, %b
  call void @llmc_tile_check(i1 %y)
  %z = icmp ne i64 %a, %b
  call void @llmc_tile_check(i1 %z)
  ret void
}}
"""


def _dot(name: str, kind: str, start: str, step: str, result: str) -> str:
    """A function that goes over rows of the sums and, for each, over rows of the right operand.

    Args:
        kind: type of a row of sums.
        start: names and types of running values with their start values: "type %name value" per line.
        step: from %pair (i32 of the left operand) and %w (<16 x i32> of the right one) to %name.next of each value.
        result: from %old (row of sums) and the values to %new.
    """
    values = [line.strip().rsplit(" ", 2) for line in start.strip().splitlines()]
    phis = "\n".join(f"  {v} = phi {t} [{s}, %rows], [{v}.next, %inner]" for t, v, s in values)
    return f"""
define linkonce_odr i32 @llmc_tdp{name}(ptr %f, i64 %ct, i64 %at, i64 %bt) {{
  call void @llmc_tile_operands(ptr %f, i64 %ct, i64 %at, i64 %bt)
  %c = call ptr @llmc_tile_at(ptr %f, i64 %ct)
  %a = call ptr @llmc_tile_at(ptr %f, i64 %at)
  %b = call ptr @llmc_tile_at(ptr %f, i64 %bt)
  %m = call i64 @llmc_tile_rows(ptr %f, i64 %ct)
  %count = call i64 @llmc_tile_rows(ptr %f, i64 %bt)
  br label %rows
rows:
  %r = phi i64 [0, %0], [%r.next, %last]
  %ro = shl i64 %r, 6
  br label %inner
inner:
  %k = phi i64 [0, %rows], [%k.next, %inner]
{phis}
  %ko = shl i64 %k, 2
  %po = add i64 %ro, %ko
  %pp = getelementptr i8, ptr %a, i64 %po
  %pair = load i32, ptr %pp
  %wo = shl i64 %k, 6
  %wp = getelementptr i8, ptr %b, i64 %wo
  %w = load <16 x i32>, ptr %wp, align 1
{step}
  %k.next = add i64 %k, 1
  %more = icmp ult i64 %k.next, %count
  br i1 %more, label %inner, label %last
last:
  %cp = getelementptr i8, ptr %c, i64 %ro
  %old = load {kind}, ptr %cp, align 1
{result}
  store {kind} %new, ptr %cp, align 1
  %r.next = add i64 %r, 1
  %again = icmp ult i64 %r.next, %m
  br i1 %again, label %rows, label %done
done:
  ret i32 0
}}
"""


def _splat(name: str, value: str) -> str:
    return f"""  %{name}.one = insertelement <16 x i32> poison, i32 {value}, i64 0
  %{name} = shufflevector <16 x i32> %{name}.one, <16 x i32> poison, <16 x i32> zeroinitializer"""


def _all(value: int) -> str:
    return "<" + ", ".join([f"i32 {value}"] * 16) + ">"


def _half(side: str, vector: str) -> str:
    """float32 of the lower (even) and the upper (odd) bf16 in each lane."""
    return f"""  %{side}.low = shl <16 x i32> {vector}, {_all(16)}
  %{side}.even = bitcast <16 x i32> %{side}.low to <16 x float>
  %{side}.high = and <16 x i32> {vector}, {_all(-65536)}
  %{side}.odd = bitcast <16 x i32> %{side}.high to <16 x float>"""


_F = "<16 x float>"
_FMA = f"call {_F} @llvm.fma.v16f32"
# even and odd columns are summed apart, and their sum is added to the old one, as TDPBF16PS does
_DOT_BF16 = _dot(
    "bf16ps",
    _F,
    f"{_F} %even zeroinitializer\n{_F} %odd zeroinitializer",
    "\n".join(
        (
            _splat("p", "%pair"),
            _half("x", "%p"),
            _half("y", "%w"),
            f"  %even.next = {_FMA}({_F} %x.even, {_F} %y.even, {_F} %even)",
            f"  %odd.next = {_FMA}({_F} %x.odd, {_F} %y.odd, {_F} %odd)",
        )
    ),
    f"  %both = fadd {_F} %even.next, %odd.next\n  %new = fadd {_F} %old, %both",
)


def _dot_bytes(name: str, left_signed: bool, right_signed: bool) -> str:
    """Products of bytes; sums modulo 2**32."""
    lines = [_splat("p", "%pair")]
    total = "%sum"
    for b in range(4):
        for side, vector, signed in (("x", "%p", left_signed), ("y", "%w", right_signed)):
            shift = "ashr" if signed else "lshr"
            lines.append(f"  %{side}{b}.up = shl <16 x i32> {vector}, {_all(24 - 8 * b)}")
            lines.append(f"  %{side}{b} = {shift} <16 x i32> %{side}{b}.up, {_all(24)}")
        lines.append(f"  %m{b} = mul <16 x i32> %x{b}, %y{b}")
        after = "%sum.next" if b == 3 else f"%sum{b}"
        lines.append(f"  {after} = add <16 x i32> {total}, %m{b}")
        total = after
    return _dot(
        name,
        "<16 x i32>",
        "<16 x i32> %sum zeroinitializer",
        "\n".join(lines),
        "  %new = add <16 x i32> %old, %sum.next",
    )
