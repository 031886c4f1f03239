"""Models of matrix units that read operands from shared memory (llmc/schedules/gpu/warpgroup.py).

Descriptors are decoded as the hardware does it (PTX ISA, "Matrix descriptor", "Strides"): an operand is what lies at the
addresses that they give, whoever meant what. Sums are NaN from the product to the wait that it is complete at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llmc.simulate.errors import failure
from llmc.simulate.intrinsics import FUNCTIONS, added, model
from llmc.simulate.machine import Machine, Pointer
from llmc.simulate.memory import Array, Ints, Memory, Registers
from llmc.simulate.ordering import Clocks, async_actors

GROUP = 128  # threads
_ROWS = 64
_WIDTH = 32  # bytes of a row
_FIELD = 0x3FFF


@dataclass
class Products:
    """Products that a strand has begun.

    Attributes:
        values: registers -> their values when everything begun so far is complete.
        current: registers of the group that is not committed; groups: of the others, oldest first, with the lanes and the
            times of the matrix units.
        fenced: a fence was executed after the last wait.
    """

    values: dict[int, tuple[Registers, Array]]
    current: list[int]
    groups: list[tuple[list[int], Ints, Array]]
    fenced: bool = False


def _products(m: Machine) -> Products:
    if m.products is None:
        m.products = Products({}, [], [])
    found = m.products
    assert isinstance(found, Products)
    return found


def _clocks(m: Machine) -> Clocks:
    clocks = m.lanes.clocks
    if not isinstance(clocks, Clocks):
        raise failure(
            "unsupported", "Products of warpgroups are modelled in kernels with counting barriers", m.node
        )
    return clocks


@model("llmc_descriptor")
def _descriptor(m: Machine, first: Pointer, leading: Any, stride: Any) -> Any:
    memory = first.memory
    assert isinstance(memory, Memory)
    address = memory.address + m.spread(first.index).astype(np.uint64) * np.uint64(first.dtype.itemsize)
    fields = (address, m.spread(leading), m.spread(stride))
    parts = [(np.asarray(f).astype(np.uint64) & np.uint64(0x3FFFF)) >> np.uint64(4) for f in fields]
    return parts[0] | parts[1] << np.uint64(16) | parts[2] << np.uint64(32)


@model("llmc_matrix_fence")
def _fence(m: Machine) -> None:
    m.whole_warps("a matrix fence")
    _products(m).fenced = True


@model("llmc_matrix_commit")
def _commit(m: Machine) -> None:
    m.whole_warps("a commit of products")
    p, clocks, active = _products(m), _clocks(m), m.active
    block, thread = clocks.at(active)
    p.groups.append((p.current, active, clocks.work[block, thread // 32] + 1))
    warps = np.unique(block * clocks.warps + thread // 32)
    clocks.work[warps // clocks.warps, warps % clocks.warps] += 1
    p.current = []


def _wait(m: Machine, groups: int) -> None:
    m.whole_warps("a wait for products")
    p, clocks = _products(m), _clocks(m)
    p.fenced = False
    while len(p.groups) > groups:
        registers, lanes, times = p.groups.pop(0)
        block, thread = clocks.at(lanes)
        unit = clocks.threads + thread // 32
        clocks.known[block, thread, unit] = np.maximum(clocks.known[block, thread, unit], times)
        busy = {r for group, _, _ in p.groups for r in group} | set(p.current)
        for number in set(registers) - busy:
            memory, values = p.values.pop(number)
            memory.data[:, lanes] = values[:, lanes]


for _n in range(4):
    FUNCTIONS[f"llmc_matrix_wait_{_n}"] = lambda m, n=_n: _wait(m, n)


def _results(m: Machine, sums: Pointer) -> None:
    _wait(m, 0)


def _operand(
    m: Machine, descriptor: Any, rows: int, groups: Ints, across: bool = False
) -> tuple[Memory, Array]:
    """(memory, bytes i64[groups, rows, 32] of it) that the descriptors of warpgroups name.

    Args:
        groups: lanes of warpgroups, [groups, 128].
        across: the operand's rows lie side by side (MN-major), those of one column after the other.
    """
    words = m.spread(descriptor).astype(np.uint64)[groups]
    if (words != words[:, :1]).any():
        raise failure("barrier", "The threads of a warpgroup give different descriptors", m.node)
    word = words[:, 0]
    start, leading, stride = (
        ((word >> np.uint64(s)) & np.uint64(_FIELD)).astype(np.int64) << 4 for s in (0, 16, 32)
    )
    if (word >> np.uint64(49)).any():
        raise failure(
            "unsupported", "The simulator knows descriptors without swizzling and base offset", m.node
        )
    row, byte = np.arange(rows)[:, None], np.arange(_WIDTH)[None, :]
    offset = lambda s: s[:, None, None]  # noqa: E731
    if across:
        column = byte // 2
        inside = column % 8 * 16 + row % 8 * 2 + byte % 2
        at = offset(start) + row // 8 * offset(stride) + column // 8 * offset(leading) + inside
    else:
        inside = row % 8 * 16 + byte % 16
        at = offset(start) + row // 8 * offset(stride) + byte // 16 * offset(leading) + inside
    memory = next((s for s in reversed(m.lanes.shared) if s.address <= int(at.min())), None)
    if memory is None:
        raise failure("bounds", f"A descriptor names address {int(at.min())} of shared memory", m.node)
    at = at - memory.address
    memory.check(at, memory.data.shape[1], m.lanes, groups[:, 0], m.node)
    return memory, at


def _multiply(
    m: Machine, kind: Any, columns: int, sums: Pointer, *operands: Any, across: bool = False
) -> None:
    """operands: of the left a descriptor or four registers, the right's descriptor, whether to add."""
    *left, right, add = operands
    m.whole_warps("a product of warpgroups")
    p, clocks, lanes, active = _products(m), _clocks(m), m.lanes, m.active
    if not p.fenced:
        raise failure("race", "A product is begun with no matrix fence after the last wait", m.node)
    groups = active.reshape(-1, GROUP) if len(active) % GROUP == 0 else None
    if groups is None or (lanes.thread[groups] % GROUP != np.arange(GROUP)).any():
        raise failure("barrier", "Some warps of a warpgroup do not take part in a product", m.node)
    block = lanes.block[groups[:, 0]]
    # the matrix units of four warps read; each time is that of the group to be committed next
    warps = lanes.thread[groups[:, ::32]] // 32
    times = clocks.work[block[:, None], warps] + 1
    visible = clocks.visible(active).reshape(len(groups), GROUP, -1).min(1)
    known = clocks.known[clocks.at(active)].reshape(len(groups), GROUP, -1).min(1)
    actors = async_actors(block, clocks.threads + warps, times, visible, known)
    values = []
    wide = np.int32 if kind is np.int8 else np.float32
    if len(left) == 4:
        values.append(_held(m, left, kind, groups).astype(wide))
    described = [(right, columns, across)] if values else [(left[0], _ROWS, False), (right, columns, across)]
    for descriptor, rows, turned in described:
        memory, at = _operand(m, descriptor, rows, groups, turned)
        units = np.unique(at.reshape(len(groups), -1)[:, :: memory.granule] // memory.granule, axis=1)
        memory.touch_by(units, actors, lanes, False, m.node)
        raw = memory.data[block[:, None, None], at]
        values.append(np.ascontiguousarray(raw).view(kind).astype(wide))
    product = values[0] @ values[1].transpose(0, 2, 1)
    _accumulate(m, p, sums, product, np.asarray(m.spread(add)), groups)


def _held(m: Machine, words: list[Any], kind: Any, groups: Ints) -> Array:
    """A left operand of 64 x 16 in registers: each warp holds 16 rows as for mma.m16n8k16."""
    thread = np.arange(GROUP)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    found = np.zeros((len(groups), _ROWS, 16), np.float32)
    for number, word in enumerate(words):
        pair = np.ascontiguousarray(m.spread(word).astype(np.uint32)[groups]).view(kind)
        for i in range(2):
            part = pair.reshape(*groups.shape, 2)[..., i].astype(np.float32)
            found[:, row + number % 2 * 8, column + number // 2 * 8 + i] = part
    return found


def _accumulate(m: Machine, p: Products, sums: Pointer, product: Array, add: Array, groups: Ints) -> None:
    registers = sums.memory
    assert isinstance(registers, Registers) and not np.any(sums.index)
    thread = np.arange(GROUP)
    number = np.arange(product.shape[2] // 2)[:, None]
    row = thread // 32 * 16 + thread % 32 // 4 + number // 2 % 2 * 8
    column = number // 4 * 8 + thread % 4 * 2 + number % 2
    found = product[:, row, column]  # [groups, registers, threads]
    _, old = p.values.get(id(registers), (registers, registers.data))
    new = old.copy()
    for i, lanes in enumerate(groups):
        new[:, lanes] = np.where(add[lanes] != 0, added(old[:, lanes], found[i]), found[i])
        wrong = np.iinfo(np.int32).max // 3 if new.dtype == np.int32 else np.nan
        registers.data[:, lanes] = wrong
    p.values[id(registers)] = (registers, new)
    p.current.append(id(registers))


_KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "s8": np.int8, "e4m3": ml_dtypes.float8_e4m3fn}
for _columns in range(8, 257, 8):
    for _name, _kind in _KINDS.items():
        FUNCTIONS[f"llmc_wgmma_{_name}_{_columns}"] = lambda m, *args, k=_kind, c=_columns: _multiply(
            m, k, c, *args
        )
    for _name in ("bf16", "f16"):
        for _left in ("across", "held"):
            FUNCTIONS[f"llmc_wgmma_{_name}_{_columns}_{_left}"] = (
                lambda m, *args, k=_KINDS[_name], c=_columns: _multiply(m, k, c, *args, across=True)
            )
    for _sums in ("f32", "s32"):
        FUNCTIONS[f"llmc_matrix_results_{_sums}_{_columns // 2}"] = _results
