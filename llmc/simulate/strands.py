"""Parts of a block that run side by side and wait for each other: warps that fetch, warps that multiply.

The simulator executes a branch for all of its threads before the other branch. Where both branches wait at counting barriers,
that would never end; each branch becomes a strand then, and runs until it has to wait. One runs at a time, and which one does
not depend on chance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.simulate.errors import failure


class _Abandoned(BaseException):
    """Another strand has failed."""


class Strands:
    """Runs functions side by side.

    Args:
        bodies: each is called with this object and its number.
    """

    def __init__(self, bodies: Sequence[Callable[[Strands, int], None]]) -> None:
        self._bodies = bodies
        self._turns = [threading.Semaphore(0) for _ in bodies]
        self._alive = [True] * len(bodies)
        self._done = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._waiting = 0  # strands that have found nothing to do, one after the other

    def run(self) -> None:
        """Until all have ended, or one has failed: its error is raised."""
        threads = [
            threading.Thread(target=self._strand, args=(i,), daemon=True) for i in range(len(self._bodies))
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        self._done.acquire()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def wait_until(self, number: int, ready: Callable[[], bool], statement: Any, what: str) -> None:
        """Strand `number` goes on when `ready`; meanwhile the others run.

        Raises:
            SimulationError: all strands wait.
        """
        while not ready():
            self._waiting += 1
            if self._waiting > sum(self._alive):
                raise failure(
                    "deadlock", f"All threads that still run wait, some of them for {what}", statement
                )
            self._pass_on(number)
            self._turns[number].acquire()
            if self._error is not None:
                raise _Abandoned
        self._waiting = 0

    def _strand(self, number: int) -> None:
        self._turns[number].acquire()
        try:
            if self._error is None:
                with np.errstate(all="ignore"):
                    self._bodies[number](self, number)
        except _Abandoned:
            pass
        except BaseException as e:
            self._error = self._error or e
        self._alive[number], self._waiting = False, 0
        if any(self._alive):
            self._pass_on(number)
        else:
            self._done.release()

    def _pass_on(self, number: int) -> None:
        count = len(self._alive)
        following = [(number + i) % count for i in range(1, count + 1)]
        self._turns[next(i for i in following if self._alive[i])].release()
