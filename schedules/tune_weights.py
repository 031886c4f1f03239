"""What kernel classes with a packed weight have in common for the tuner."""

from __future__ import annotations

from typing import Any

from llmc.caps import Capabilities
from llmc.schedules.layout import usual_vectors
from llmc.schedules.tunable import Arguments, Tunable, balance
from llmc.schedules.tune_data import ITEM_BYTES, Array, empty_result


class TunableWeight(Tunable):
    """y[rows, n] of (x[rows, k], [ids[rows]], packed weight, [bias], [residual]); tasks have n and dtypes."""

    def arguments(
        self,
        task: Any,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        packed = self.pack(task, schedule, case, caps) if packed is None else packed
        before, behind = (
            [case[name] for name in names if name in case] for names in (("x", "ids"), ("bias", "residual"))
        )
        y = empty_result((case["x"].shape[0], task.n), task.out_dtype)
        others = {1: tuple(case["other_ids"])} if "other_ids" in case else {}
        return Arguments((*before, packed, *behind, y), (len(before),), len(before) + len(behind) + 1, others)


def rows_bytes(task: Any, rows: int, k: int) -> float:
    """What a call reads and writes beside the weight: x, the residual, y."""
    of_y = ITEM_BYTES[task.out_dtype] + ITEM_BYTES[task.in_dtype] * getattr(task, "has_residual", False)
    return float(rows * (k * ITEM_BYTES[task.in_dtype] + task.n * of_y))


def vector_counts(caps: Capabilities) -> tuple[int, ...]:
    """Vectors of outputs per weight block that are worth trying; 0 = the usual number."""
    return (1, 2, 0, 6, 8) if usual_vectors(caps) == 4 else (1, 0, 3, 4)


def too_wide(vectors: int, n: int, caps: Capabilities) -> bool:
    """Whether a block of so many vectors is mostly padding for n outputs."""
    return vectors * caps.lanes_f32 > max(n, usual_vectors(caps) * caps.lanes_f32)


def usual_tile(vectors: int, caps: Capabilities) -> int:
    """Rows of a register tile that kernels take by themselves, as MicroKernel.max_rows."""
    return max(1, min(6, (caps.vector_registers - vectors - 2) // vectors))


def register_tile_fits(rows: int, vectors: int, caps: Capabilities) -> bool:
    """Whether sums of so many rows and vectors, the weights of a step and a broadcast fit into the registers."""
    return rows * vectors + vectors + 1 <= caps.vector_registers


def register_terms(rows: float, vectors: int, caps: Capabilities) -> dict[str, float]:
    """Of a register tile, for the cost model: registers in use, and multiply-adds per load."""
    return {
        "registers": (rows * vectors + vectors + 1) / caps.vector_registers,
        "updates_per_load": rows * vectors / (rows + vectors),
    }


def task_terms(tasks: float, caps: Capabilities) -> dict[str, float]:
    """Of work in so many equal pieces, for the cost model: pieces per thread, and how uneven they fall."""
    return {"tasks": tasks / caps.threads, "balance": balance(tasks, caps.threads)}
