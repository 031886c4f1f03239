"""Models of the device functions that kernels call by name (cuda.func_call): what each does to all threads at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from llmc.simulate.errors import failure
from llmc.simulate.machine import WARP, Machine, Pointer
from llmc.simulate.memory import Array, Memory

# name in the generated source -> its model
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def model(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the model of a device function; it is called with the machine and the evaluated arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS[name] = function
        return function

    return register


@model("llmc_warp_barrier")
def _warp_barrier(m: Machine) -> None:
    m.warp_barrier()


@model("llmc_dynamic_shared")
def _dynamic_shared(m: Machine, size: Any) -> None:
    """Says how much shared memory a kernel has; the allocation itself is modelled."""


@model("llmc_device_fence")
def _device_fence(m: Machine) -> None:
    """Orders writes of one thread; memory is one here."""


@model("llmc_exp2")
def _exp2(m: Machine, value: Any) -> Any:
    with np.errstate(under="ignore", over="ignore"):
        return np.exp2(m.spread(value).astype(np.float32))


@model("llmc_tanh")
def _tanh(m: Machine, value: Any) -> Any:
    with np.errstate(over="ignore"):
        grown = np.exp2(m.spread(value).astype(np.float32) * np.float32(2.8853900817779268))
        return (1 - 2 / (grown + 1)).astype(np.float32)


@model("llmc_to_bf16")
def _to_bf16(m: Machine, value: Any) -> Any:
    return np.asarray(value).astype(ml_dtypes.bfloat16).view(np.uint16)[()]


def _halves(m: Machine, value: Any, kind: Any) -> Array:
    """Both numbers of pairs in 32 bits, as float32 [threads, 2]."""
    words = np.ascontiguousarray(m.spread(value).astype(np.uint32))
    return words.view(kind).reshape(-1, 2).astype(np.float32)


def _joined(values: Array, kind: Any) -> Array:
    return np.ascontiguousarray(values.astype(kind)).view(np.uint32).reshape(-1)


for _name, _kind in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)):

    def _fma2(m: Machine, a: Any, b: Any, c: Any, kind: Any = _kind) -> Any:
        """Products of 16-bit numbers are exact in float32; so is the sum where kernels use it."""
        x, y, z = (_halves(m, v, kind) for v in (a, b, c))
        return _joined(x * y + z, kind)

    def _pack2(m: Machine, low: Any, high: Any, kind: Any = _kind) -> Any:
        return _joined(np.stack([m.spread(low), m.spread(high)], axis=-1), kind)

    FUNCTIONS[f"llmc_fma2_{_name}"] = _fma2
    FUNCTIONS[f"llmc_pack2_{_name}"] = _pack2


def _code_pair(m: Machine, word: Any, picked: Any, codes: str, kind: Any) -> Any:
    """Two codes of a word of four as numbers: of bytes 0 and 1, or 2 and 3 (see schedules/gpu/code_pairs.py)."""
    stored = np.ascontiguousarray(m.spread(word).astype(np.uint32)).view(np.uint8).reshape(-1, 4)
    lower = np.isin(m.spread(picked), (0x4140, 0x1404))
    pair = np.where(lower[:, None], stored[:, :2], stored[:, 2:])
    if codes == "int8":
        return _joined(pair.astype(np.float32) - 128, kind)
    exponent, mantissa = (pair >> 3 & 15).astype(np.int32), (pair & 7).astype(np.float32)
    size = np.where(exponent == 0, mantissa * 2.0**-9, np.ldexp(1 + mantissa / 8, exponent - 7))
    return _joined(np.where(pair & 0x80, -size, size), kind)


for _codes in ("int8", "e4m3"):
    for _name, _kind in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)):
        FUNCTIONS[f"llmc_codes_{_codes}_{_name}"] = lambda m, word, picked, codes=_codes, kind=_kind: (
            _code_pair(m, word, picked, codes, kind)
        )


@model("llmc_and_or")
def _and_or(m: Machine, a: Any, b: Any, c: Any) -> Any:
    return (m.spread(a) & m.spread(b)) | m.spread(c)


@model("llmc_round_byte")
def _round_byte(m: Machine, value: Any, factor: Any) -> Any:
    """The lowest byte of the nearest integer; a product of float32 is exact in float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        moved = m.spread(value).astype(np.float64) * m.spread(factor).astype(np.float64) + 12582912.0
        return moved.astype(np.float32).view(np.int32).astype(np.int8)


@model("llmc_to_e4m3")
def _to_e4m3(m: Machine, value: Any, factor: Any) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = m.spread(value).astype(np.float32) * m.spread(factor).astype(np.float32)
        kept = np.clip(scaled, -448, 448)  # saturates; NaN stays
        return kept.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@model("llmc_multiply")
def _multiply(m: Machine, a: Any, b: Any) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):
        return m.spread(a).astype(np.float32) * m.spread(b).astype(np.float32)


@model("llmc_add")
def _add(m: Machine, a: Any, b: Any) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):
        return m.spread(a).astype(np.float32) + m.spread(b).astype(np.float32)


# -- asynchronous copies: 16 bytes of a thread, in groups that it waits for ------------------------------------------------


@model("llmc_copy16")
def _copy16(m: Machine, to: Pointer, source: Pointer, size: Any) -> None:
    """The target is filled with NaN at once, and with the data when the thread waits for it."""
    active = m.active
    sizes = m.spread(size)[active]
    data = np.zeros((len(active), 16), np.uint8)
    target = _bytes_at(m, to)[active]
    origin = _bytes_at(m, source)[active]
    reads = sizes > 0
    data[reads] = _access(m, source.memory, origin[reads], active[reads], write=False)
    _access(m, to.memory, target, active, write=True, data=np.full_like(data, 0xFF))
    m.pending.append((to.memory, target, active, data))


@model("llmc_copy_commit")
def _copy_commit(m: Machine) -> None:
    m.whole_warps("a commit of copies")
    m.groups.append(m.pending)
    m.pending = []


def _copy_wait(m: Machine, groups: int) -> None:
    m.whole_warps("a wait for copies")
    while len(m.groups) > groups:
        for memory, target, active, data in m.groups.pop(0):
            _access(m, memory, target, active, write=True, data=data)


for _n in range(8):
    FUNCTIONS[f"llmc_copy_wait_{_n}"] = lambda m, n=_n: _copy_wait(m, n)


def _bytes_at(m: Machine, pointer: Pointer) -> Array:
    """Byte of a memory that each thread's pointer points to."""
    return m.spread(pointer.index).astype(np.int64) * pointer.dtype.itemsize


def _access(
    m: Machine, memory: Any, at: Array, active: Array, *, write: bool, data: Array | None = None
) -> Array:
    """16 bytes at byte `at` per active thread: read them, or write `data`; returns them."""
    assert isinstance(memory, Memory)
    if len(at) == 0:
        return np.zeros((0, 16), np.uint8)
    if (at % 16).any():
        raise failure(
            "alignment", f"16 bytes of {memory.name} are accessed at byte {int(at[at % 16 != 0][0])}", m.node
        )
    view = memory.view(np.dtype(np.uint8))
    index = at[:, None] + np.arange(16)
    memory.check(index, view.shape[1], m.lanes, active, m.node)
    units = index[:, :: memory.granule] // memory.granule
    memory.touch(units, memory.granule, m.lanes, active, write, m.node)
    rows = m.lanes.block[active][:, None] if memory.shared else 0
    if data is None:
        found: Array = view[rows, index]
        return found
    view[rows, index] = data
    return data


def _load_words(m: Machine, to: Pointer, source: Pointer, count: int) -> None:
    memory, active, size = source.memory, m.active, 4 * count
    assert isinstance(memory, Memory)
    at = _bytes_at(m, source)[active]
    if (at % size).any():
        wrong = int(at[at % size != 0][0])
        raise failure("alignment", f"{size} bytes of {memory.name} are loaded at byte {wrong}", m.node)
    view = memory.view(np.dtype(np.uint8))
    index = at[:, None] + np.arange(size)
    memory.check(index, view.shape[1], m.lanes, active, m.node)
    memory.touch(
        index[:, :: memory.granule] // memory.granule, memory.granule, m.lanes, active, False, m.node
    )
    words = np.ascontiguousarray(view[0, index]).view(np.uint32)
    for i in range(count):
        value = np.zeros(m.lanes.n, np.uint32)
        value[active] = words[:, i]
        m.store(to.memory, to.dtype, np.asarray(to.index) + i, value, False)


for _n in (1, 2, 4):
    FUNCTIONS[f"llmc_load_words_{_n}"] = lambda m, to, source, n=_n: _load_words(m, to, source, n)


# -- matrix units (PTX ISA, fragments of ldmatrix and mma.m16n8k16) ---------------------------------------------------------


def _ldmatrix_x4(m: Machine, to: Pointer, source: Pointer, transposed: bool) -> None:
    m.whole_warps("ldmatrix")
    memory = source.memory
    assert isinstance(memory, Memory)
    active = m.active
    first = active // WARP * WARP
    _whole_blocks_of_warps(m)
    at = _bytes_at(m, source)
    if (at[active] % 16).any():
        raise failure(
            "alignment", f"A row of {memory.name} for ldmatrix begins at byte {int(at.max())}", m.node
        )
    lane = active % WARP
    view = memory.view(np.dtype(np.uint16))
    block = m.lanes.block[active]
    for j in range(4):
        halves = []
        for i in range(2):
            row, column = (lane % 4 * 2 + i, lane // 4) if transposed else (lane // 4, lane % 4 * 2 + i)
            element = at[first + 8 * j + row] // 2 + column
            memory.check(element, view.shape[1], m.lanes, active, m.node)
            memory.touch(element, 2, m.lanes, active, False, m.node)
            halves.append(view[block, element].astype(np.uint32))
        value = np.zeros(m.lanes.n, np.uint32)
        value[active] = halves[0] | halves[1] << 16
        m.store(to.memory, to.dtype, np.asarray(to.index) + j, value, False)


FUNCTIONS["llmc_ldmatrix_x4"] = lambda m, to, source: _ldmatrix_x4(m, to, source, False)
FUNCTIONS["llmc_ldmatrix_x4_trans"] = lambda m, to, source: _ldmatrix_x4(m, to, source, True)


def added(old: Array, product: Array) -> Array:
    """Sums of the matrix units: in full precision here, if a test says nothing else."""
    total: Array = old + product
    return total


def mma(
    m: Machine, kind: Any, c: Pointer, *operands: Any, add: Callable[[Array, Array], Array] = added
) -> None:
    """m16n8k16 of 16-bit numbers with float32 sums, m16n8k32 of bytes with int32 sums, and of e4m3."""
    m.whole_warps("mma")
    _whole_blocks_of_warps(m)
    words = [np.ascontiguousarray(m.spread(o)).reshape(-1, WARP) for o in operands]
    each = 4 // np.dtype(kind).itemsize
    wide = np.int32 if kind is np.int8 else np.float32
    parts = [w.view(kind).reshape(*w.shape, each).astype(wide) for w in words]
    warps, lane = parts[0].shape[0], np.arange(WARP)
    row, column = lane // 4, lane % 4 * each
    a, b = np.zeros((warps, 16, 8 * each), wide), np.zeros((warps, 8 * each, 8), wide)
    for i in range(each):
        for part in range(4):
            a[:, row + part % 2 * 8, column + part // 2 * 4 * each + i] = parts[part][..., i]
        for part in range(2):
            b[:, column + part * 4 * each + i, row] = parts[4 + part][..., i]
    product = a @ b
    column = lane % 4 * 2
    for part in range(4):
        value = product[:, row + part // 2 * 8, column + part % 2].reshape(-1)
        at = np.asarray(c.index) + part
        old = m.load(c.memory, c.dtype, at, False)
        m.store(c.memory, c.dtype, at, add(old, value), False)


def _whole_blocks_of_warps(m: Machine) -> None:
    if m.lanes.block_size % WARP:
        raise failure(
            "unsupported", f"A block of {m.lanes.block_size} threads does not consist of warps", m.node
        )


FUNCTIONS["llmc_mma_bf16"] = lambda m, *args: mma(m, ml_dtypes.bfloat16, *args)
FUNCTIONS["llmc_mma_f16"] = lambda m, *args: mma(m, np.float16, *args)
FUNCTIONS["llmc_mma_s8"] = lambda m, *args: mma(m, np.int8, *args)
FUNCTIONS["llmc_mma_e4m3"] = lambda m, *args: mma(m, ml_dtypes.float8_e4m3fn, *args)
