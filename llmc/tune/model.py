"""The cost model: gradient-boosted trees that rank schedules before they are measured (xgboost, arXiv 1603.02754).

It predicts how much faster than the default a schedule is: the logarithm of the default's time over the schedule's. Time
itself differs by orders of magnitude between tasks, this does not, so one model learns from all tasks of a kernel class and
ranks candidates of a task that it has never seen.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules.records import Record, Status
from llmc.schedules.tunable import Tunable
from llmc.schedules.tuned_choice import is_current

Array = np.ndarray[Any, Any]
FAILED = -1.5  # what a candidate that does not work counts as: 4.5 times slower
_LEAST_SAMPLES = 8
_ROUNDS = 120
_PARAMETERS = {
    "max_depth": 6,
    "eta": 0.15,
    "min_child_weight": 1,
    "subsample": 0.9,
    "colsample_bytree": 0.9,
    "objective": "reg:squarederror",
    "tree_method": "hist",
    "seed": 1,
    "verbosity": 0,
}


def require_xgboost() -> Any:
    """The xgboost module.

    Raises:
        LlmcError: it is not installed.
    """
    try:
        import xgboost
    except ImportError:
        raise LlmcError(
            "no-xgboost",
            "Tuning needs xgboost for its cost model, and it is not installed.",
            hint="pip install 'llmc-compiler[compile]'.",
        ) from None
    return xgboost


def has_xgboost() -> bool:
    """Whether a cost model can be had."""
    return importlib.util.find_spec("xgboost") is not None


class CostModel:
    """Ranks the schedules of one kernel class.

    Attributes:
        samples: how many measurements it has learned from.
    """

    def __init__(self, tunable: Tunable, caps: Capabilities) -> None:
        self._xgboost = require_xgboost()
        self.tunable, self.caps = tunable, caps
        self._x: list[list[float]] = []
        self._y: list[float] = []
        self._booster: Any = None
        self._fitted = 0

    @property
    def samples(self) -> int:
        return len(self._y)

    def learn(self, task: Any, rows: int, schedule: Any, ratio: float, *, ok: bool = True) -> None:
        """Add a measurement: `ratio` = its time over the default's."""
        self._x.append(self.features(task, rows, schedule))
        self._y.append(-math.log(max(ratio, 1e-3)) if ok else FAILED)

    def learn_records(self, records: Iterable[Record]) -> None:
        """Add what records of the class hold, of any task and device."""
        for record in records:
            if record.rule == self.tunable.name and is_current(record, self.tunable, self.caps):
                task = self.tunable.from_values(record.task)
                schedule = self.tunable.schedule_type(**record.schedule)
                self.learn(task, record.rows, schedule, record.ratio, ok=record.status is Status.OK)

    def features(self, task: Any, rows: int, schedule: Any) -> list[float]:
        """The schedule's fields, what they amount to, and how large the task is."""
        work = self.tunable.work(task, rows)
        terms = self.tunable.terms(task, schedule, rows, self.caps)
        own = [float(getattr(schedule, f.name)) for f in fields(schedule)]
        return [
            *own,
            *(terms[name] for name in sorted(terms)),
            math.log2(rows),
            math.log2(work.bytes),
            math.log2(work.operations / work.bytes),
        ]

    def predict(self, task: Any, rows: int, schedules: Sequence[Any]) -> Array:
        """How good the schedules are, higher is better; all alike before enough has been learned."""
        if self.samples < _LEAST_SAMPLES or not schedules:
            return np.zeros(len(schedules))
        if self._fitted != self.samples:
            self._fit()
        x = np.array([self.features(task, rows, s) for s in schedules], np.float32)
        return np.asarray(self._booster.predict(self._xgboost.DMatrix(x)))

    def _fit(self) -> None:
        data = self._xgboost.DMatrix(np.array(self._x, np.float32), label=np.array(self._y, np.float32))
        self._booster = self._xgboost.train(_PARAMETERS, data, num_boost_round=_ROUNDS)
        self._fitted = self.samples


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean rank; nan for fewer than three or all equal."""
    if len(a) < 3:
        return math.nan
    x, y = _ranks(np.asarray(a, float)), _ranks(np.asarray(b, float))
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]
