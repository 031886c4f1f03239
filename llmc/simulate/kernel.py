"""simulate(): run a lowered GPU PrimFunc on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from llmc.simulate.errors import failure
from llmc.simulate.expressions import ExpressionCompiler, dtype_of, root_of, type_text, visit
from llmc.simulate.machine import Counts, Machine
from llmc.simulate.memory import Array, Lanes, Memory, Registers
from llmc.simulate.ordering import Clocks, OrderedShadow
from llmc.simulate.strands import Strands

_CHUNK = 32768  # threads that run side by side
_AXES = ("x", "y", "z")
_DEVICE_CALL = "tirx.cuda.func_call"
_WAIT = "llmc_barrier_wait"
_READS = {
    "llmc_copy16": 1,
    "llmc_bulk_copy": 1,
    **{f"llmc_load_words_{n}": 1 for n in (1, 2, 4)},
}  # device functions -> which of their arguments they only read at
Runner = Callable[[Machine], None]


def simulate(func: Any, args: Sequence[Any], *, races: bool = True, chunk: int = _CHUNK) -> list[Counts]:
    """Run a kernel.

    Args:
        func: a PrimFunc after llmc.targets.simt.lower: flat buffers, blockIdx and threadIdx bound; or one of the kernels
            that it is split into for the device, which take pointers.
        args: a C-contiguous numpy array for each tensor (results too; changed in place), an int for each scalar; bytes
            (uint8) from where it points to on for a pointer.
        races: whether to look for races (the other checks are always on).
        chunk: blocks are run side by side as long as their threads together are no more.

    Returns:
        what each launch did, in order.

    Raises:
        SimulationError: race, access out of bounds or unaligned, divergent barrier or shuffle, unknown operator.
    """
    return Kernel(func, races=races).run(args, chunk=chunk)


class Kernel:
    """A kernel compiled for simulation; may be run often."""

    def __init__(self, func: Any, *, races: bool = True) -> None:
        self._compiler = _StatementCompiler(func, races)
        self._params = list(func.params)
        self._body = self._compiler.stmt(func.body)

    def run(self, args: Sequence[Any], *, chunk: int = _CHUNK) -> list[Counts]:
        """See simulate()."""
        compiler = self._compiler
        # the parameters and the variables of their shapes may be new
        room = len(compiler.slots) + len(args) + sum(np.ndim(a) for a in args)
        host = Machine(Lanes(0, 1, 1), [None] * room, Counts())
        _bind(compiler, host, self._params, args)
        compiler.chunk, compiler.launches = chunk, []
        with np.errstate(all="ignore"):
            self._body(host)
        return compiler.launches


def _bind(compiler: _StatementCompiler, host: Machine, params: list[Any], args: Sequence[Any]) -> None:
    """Put arguments into the host's variables and solve the symbolic dimensions."""
    if len(params) != len(args):
        raise ValueError(f"the kernel takes {len(params)} arguments, found {len(args)}")
    for param, arg in zip(params, args, strict=True):
        if isinstance(param.ty, tvm.ir.PointerType):
            granule = compiler.granules.get(param, 1)
            watched = compiler.races and param in compiler.written
            memory = Memory(param.name, arg.reshape(1, -1), granule, shared=False, watch=watched)
            host.values[compiler.slot(param)] = memory
            continue
        if not isinstance(param.ty, tirx.BufferType):
            host.values[compiler.slot(param)] = dtype_of(type_text(param))[0].type(arg)
            continue
        declared = param.ty
        dtype, _ = dtype_of(str(declared.dtype))
        if arg.dtype != dtype or not arg.flags.c_contiguous or arg.ndim != len(declared.shape):
            raise ValueError(
                f"{param.name}: needs contiguous {declared.dtype}, found {arg.dtype} {arg.shape}"
            )
        for extent, found in zip(declared.shape, arg.shape, strict=True):
            if isinstance(extent, tirx.IntImm):
                if int(extent) != found:
                    raise ValueError(f"{param.name}: has shape {arg.shape}, wants {declared.shape}")
            elif isinstance(extent, tirx.Var):
                slot = compiler.slot(extent)
                known = host.values[slot]
                if known is not None and int(known) != found:
                    raise ValueError(f"{param.name}: {extent.name} is {known} elsewhere, {found} here")
                host.values[slot] = dtype_of(type_text(extent))[0].type(found)
        offset = declared.elem_offset
        if isinstance(offset, tirx.Var):  # TVM's own kernels take tensors that begin inside of others
            host.values[compiler.slot(offset)] = dtype_of(type_text(offset))[0].type(0)
        raw = arg.reshape(-1).view(np.uint8).reshape(1, -1)
        granule = compiler.granules.get(param, arg.dtype.itemsize)
        watched = compiler.races and param in compiler.written
        host.values[compiler.slot(param)] = Memory(param.name, raw, granule, shared=False, watch=watched)


class _StatementCompiler(ExpressionCompiler):
    """Compiles the statements of one kernel to functions that run them on a machine."""

    def __init__(self, func: Any, races: bool) -> None:
        super().__init__()
        self.races = races
        self.chunk = _CHUNK
        self.launches: list[Counts] = []
        self.granules: dict[Any, int] = {}
        self.written: set[Any] = set()
        self._launching = False
        self._binding: dict[Any, Any] = {}
        self._scan(func.body)
        for param in func.params:
            self.slot(param)
            if isinstance(param.ty, tirx.BufferType):
                for extent in param.ty.shape:
                    if isinstance(extent, tirx.Var):
                        self.slot(extent)
                if isinstance(param.ty.elem_offset, tirx.Var):
                    self.slot(param.ty.elem_offset)

    def _scan(self, body: Any) -> None:
        """Which buffers are written, and the smallest element that each is taken as; views count for what they view."""
        roots: dict[Any, Any] = {}

        def note(buffer: Any, write: bool) -> None:
            root = roots.get(buffer, buffer)
            size = dtype_of(str(buffer.ty.dtype))[0].itemsize
            self.granules[root] = min(size, self.granules.get(root, size))
            if write:
                self.written.add(root)

        only_read: list[Any] = []

        def node(n: Any) -> None:
            name = str(getattr(n.op, "name", "")) if isinstance(n, tvm.ir.Call) else ""
            if name == _DEVICE_CALL and str(n.args[0].value) in _READS:
                only_read.append(n.args[1 + _READS[str(n.args[0].value)]])
            if isinstance(n, tirx.DeclBuffer):
                source = root_of(n.data)
                roots[n.buffer] = roots.get(source, source)
            elif isinstance(n, tvm.ir.TensorLoad):
                note(n.source, False)
            elif isinstance(n, tirx.BufferStore):
                note(n.buffer, True)
            elif name == "tirx.address_of":
                note(n.args[0].source, not any(n.same_as(other) for other in only_read))

        visit(body, node)

    def stmt(self, s: Any) -> Runner:
        """A function that runs the statement."""
        method = getattr(self, f"_stmt_{type(s).__name__.lower()}", None)
        if method is None:
            raise failure(
                "unsupported", f"The simulator does not know statements of kind {type(s).__name__}", s
            )
        found: Runner = method(s)
        return found

    def _stmt_seqstmt(self, s: Any) -> Runner:
        parts = [self.stmt(part) for part in s.seq]

        def run(m: Machine) -> None:
            for part in parts:
                part(m)

        return run

    def _stmt_evaluate(self, s: Any) -> Runner:
        if isinstance(s.value, tirx.IntImm):
            return lambda m: None
        value = self.expr(s.value)

        def run(m: Machine) -> None:
            m.node = s
            value(m)

        return run

    def _stmt_bind(self, s: Any) -> Runner:
        value, slot = self.expr(s.value), self.slot(s.var)

        def run(m: Machine) -> None:
            m.node = s
            m.values[slot] = value(m)

        return run

    def _stmt_bufferstore(self, s: Any) -> Runner:
        memory, dtype = self.buffer(s.buffer)
        index, value = self.expr(s.indices[0]), self.expr(s.value)
        contiguous = isinstance(s.indices[0], tirx.Ramp) and int(s.indices[0].stride) == 1

        def run(m: Machine) -> None:
            m.node = s
            m.store(m.values[memory], dtype, index(m), value(m), contiguous)

        return run

    def _stmt_ifthenelse(self, s: Any) -> Runner:
        cond, yes = self.expr(s.condition), self.stmt(s.then_case)
        no = self.stmt(s.else_case) if s.else_case is not None else None
        both_wait = no is not None and _calls(s.then_case, _WAIT) and _calls(s.else_case, _WAIT)

        def run(m: Machine) -> None:
            m.node = s
            c = np.asarray(cond(m))
            if both_wait and c.ndim and no is not None:
                _side_by_side(m, c, yes, no)
                return
            if c.ndim == 0:
                if c:
                    yes(m)
                elif no is not None:
                    no(m)
                return
            outer = m.mask
            for mask, branch in ((m.narrowed(c), yes), (m.narrowed(~c), no)):
                if mask is not None and branch is not None:
                    m.mask = mask
                    branch(m)
                    m.mask = outer

        return run

    def _stmt_assertstmt(self, s: Any) -> Runner:
        condition = self.expr(s.condition)

        def run(m: Machine) -> None:
            m.node = s
            if not np.all(np.asarray(condition(m))):
                raise failure("assertion", "An assertion of the kernel does not hold", s)

        return run

    def _stmt_for(self, s: Any) -> Runner:
        slot = self.slot(s.loop_var)
        start, extent, body = self.expr(s.min), self.expr(s.extent), self.stmt(s.body)
        dtype, _ = dtype_of(type_text(s.loop_var))

        def run(m: Machine) -> None:
            m.node = s
            first, count = np.asarray(start(m)), np.asarray(extent(m))
            if count.ndim == 0:
                for i in range(int(count)):
                    m.values[slot] = (first + i).astype(dtype)[()]
                    body(m)
                return
            outer, i = m.mask, 0
            while (mask := m.narrowed(i < count)) is not None:
                m.mask = mask
                m.values[slot] = (first + i).astype(dtype)[()]
                body(m)
                m.mask, i = outer, i + 1

        return run

    def _stmt_while(self, s: Any) -> Runner:
        cond, body = self.expr(s.condition), self.stmt(s.body)

        def run(m: Machine) -> None:
            outer = m.mask
            while True:
                m.node = s
                c = np.asarray(cond(m))
                mask = m.narrowed(m.spread(c)) if c.ndim else (m.mask if c else None)
                if c.ndim == 0 and not c:
                    break
                if c.ndim and mask is None:
                    break
                m.mask = mask
                body(m)
            m.mask = outer

        return run

    def _stmt_declbuffer(self, s: Any) -> Runner:
        source = self.expr(root_of(s.data))
        slot = self.slot(s.buffer)

        def run(m: Machine) -> None:
            m.values[slot] = source(m)

        return run

    def _stmt_allocbuffer(self, s: Any) -> Runner:
        if not self._launching:
            return self._host_alloc(s)
        buffer, slot = s.buffer, self.slot(s.buffer)
        dtype, lanes = dtype_of(str(buffer.ty.dtype))
        size = lanes
        for extent in buffer.ty.shape:
            size *= int(extent)
        scope, name = str(buffer.ty.storage_scope), str(buffer.name)
        granule = self.granules.get(buffer, dtype.itemsize)

        def run(m: Machine) -> None:
            if scope.startswith("shared"):
                m.counts.shared_bytes += size * dtype.itemsize
                raw = _poison(m.lanes.blocks, size * dtype.itemsize)
                make = OrderedShadow if m.lanes.clocks is not None else None
                memory = Memory(name, raw, granule, shared=True, watch=self.races, make=make)
                m.lanes.place(memory)
                m.values[slot] = memory
            else:
                m.values[slot] = Registers(name, size, dtype, m.lanes.n)

        if scope.startswith("shared") or scope in ("", "local"):
            return run
        raise failure("unsupported", f"The buffer {name} is of scope {scope}, which a kernel cannot allocate")

    def _host_alloc(self, s: Any) -> Runner:
        """Device memory between the launches of one kernel."""
        buffer, slot = s.buffer, self.slot(s.buffer)
        dtype, lanes = dtype_of(str(buffer.ty.dtype))
        extents = [self.expr(extent) for extent in buffer.ty.shape]
        name, granule = str(buffer.name), self.granules.get(buffer, dtype.itemsize)

        def run(m: Machine) -> None:
            size = lanes * dtype.itemsize
            for extent in extents:
                size *= int(extent(m))
            m.values[slot] = Memory(name, _poison(1, size), granule, shared=False, watch=self.races)

        return run

    # -- launches ----------------------------------------------------------------------------------------------------

    def _stmt_attrstmt(self, s: Any) -> Runner:
        if str(s.attr_key) != "thread_extent":
            return self.stmt(s.body)
        if self._launching:
            return self._bound(s)
        self._launching = True
        extents: dict[str, Any] = {}

        def node(n: Any) -> None:
            if isinstance(n, tirx.AttrStmt) and str(n.attr_key) == "thread_extent":
                extents.setdefault(str(n.node.thread_tag), n.value)

        visit(s, node)
        sizes = {tag: self.expr(value) for tag, value in extents.items()}
        body = self._bound(s)
        self._launching = False
        counting = _calls(s, "llmc_barrier_init")

        def run(m: Machine) -> None:
            grid = [int(sizes[f"blockIdx.{a}"](m)) if f"blockIdx.{a}" in sizes else 1 for a in _AXES]
            block = [int(sizes[f"threadIdx.{a}"](m)) if f"threadIdx.{a}" in sizes else 1 for a in _AXES]
            self._launch(m, grid, block, body, counting)

        return run

    def _bound(self, s: Any) -> Runner:
        """A thread_extent inside a launch: its variable is one of the lanes' coordinates."""
        slot, tag = self.slot(s.node.var), str(s.node.thread_tag)
        dtype, _ = dtype_of(type_text(s.node.var))
        body = self.stmt(s.body)

        def run(m: Machine) -> None:
            m.values[slot] = self._coordinates[tag].astype(dtype)
            body(m)

        return run

    def _launch(self, host: Machine, grid: list[int], block: list[int], body: Runner, counting: bool) -> None:
        threads, blocks = block[0] * block[1] * block[2], grid[0] * grid[1] * grid[2]
        if threads > 1024 or threads < 1:
            raise failure("unsupported", f"A block has {threads} threads; a GPU takes 1 to 1024")
        counts = Counts(blocks=blocks, threads=threads)
        self.launches.append(counts)
        for value in host.values:  # a launch begins when the one before has ended
            if isinstance(value, Memory):
                value.forget(OrderedShadow if counting else None)
        # blocks in lockstep would wait for each other's counting barriers
        step = 1 if counting else max(1, self.chunk // threads)
        for first in range(0, blocks, step):
            lanes = Lanes(first, min(step, blocks - first), threads)
            if counting:
                lanes.clocks = Clocks(lanes)
            self._coordinates = _coordinates(lanes, grid, block)
            counts.shared_bytes = 0
            body(Machine(lanes, list(host.values), counts))


def _calls(node: Any, name: str) -> bool:
    """Whether a device function is called in a statement."""
    found: list[bool] = []

    def see(n: Any) -> None:
        if isinstance(n, tvm.ir.Call) and str(getattr(n.op, "name", "")) == _DEVICE_CALL:
            found.append(str(n.args[0].value) == name)

    visit(node, see)
    return any(found)


def _side_by_side(m: Machine, condition: Array, yes: Runner, no: Runner) -> None:
    """Both branches, whose threads wait for each other."""
    if m.strands is not None:
        raise failure("unsupported", "Branches that wait for each other stand within such branches", m.node)
    parts = [(m.narrowed(c), body) for c, body in ((condition, yes), (~condition, no))]
    bodies = [
        lambda strands, number, mask=mask, body=body: body(m.part(mask, strands, number))
        for mask, body in parts
        if mask is not None
    ]
    Strands(bodies).run()


def _coordinates(lanes: Lanes, grid: list[int], block: list[int]) -> dict[str, Array]:
    number = lanes.first_block + lanes.block
    found = {}
    for prefix, value, sizes in (("blockIdx", number, grid), ("threadIdx", lanes.thread, block)):
        for axis, size in zip(_AXES, sizes, strict=True):
            found[f"{prefix}.{axis}"] = value % size
            value = value // size
    return found


def _poison(rows: int, size: int) -> Array:
    """Shared memory before anything is written: NaN in every float type (0x7fff.. or 0xffff..)."""
    return np.full((rows, size), 0xFF, np.uint8)


__all__ = ["Kernel", "simulate"]
