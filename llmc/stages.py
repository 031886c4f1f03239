"""The stage runner: what `llmc/pipeline/compile.py` runs its ordered table of stages through.

It times every stage and pass, reports progress, dumps intermediate results, stops where it was told to, and
turns a bug into a reproducer folder. It knows nothing of what the stages do.

    with StageRunner(spec, stages=("capture", "lower", "build"), dump_ir=Path("ir")) as runner:
        graph = runner.run("capture", capture, spec)
        step = runner.run("lower", lambda: run_passes(runner, "lower", PASSES, graph.module))
        return runner.run("build", build, step)
    return None  # stopped by stop_after
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from llmc.errors import LlmcError
from llmc.reproducer import write_reproducer
from llmc.runtime.memory import peak_rss
from llmc.spec import CompileSpec

T = TypeVar("T")
U = TypeVar("U")

# the stages of a compile, in order; pipeline/compile.py runs exactly these
STAGES = (
    "search",
    "capture",
    "rewrite",
    "tune",
    "lower",
    "build",
    "calibrate",
    "pack",
    "write",
    "verify",
    "evaluate",
)


@dataclass(frozen=True)
class Timing:
    """What one stage (``part == ""``) or one pass of a stage took.

    Attributes:
        stage: name of the stage.
        part: name of the pass within the stage; empty for the stage as a whole.
        seconds: wall time.
        peak_rss: largest resident memory of this process up to the end of it, in bytes.
    """

    stage: str
    part: str
    seconds: float
    peak_rss: int


class ProgressReporter:
    """Told what a compile is doing. This base class is silent; `llmc/cli/progress.py` shows it."""

    def stage_started(self, stage: str, number: int, total: int) -> None:
        """Stage `number` (1-based) of `total` starts."""

    def stage_finished(self, timing: Timing) -> None:
        """A stage is done."""

    def advance(self, done: float, total: float, what: str) -> None:
        """Progress within the running stage, e.g. tensors packed; `done` of `total` in any unit."""

    def note(self, text: str) -> None:
        """A line that the user should see, e.g. which dtype was chosen."""

    def timings(self, timings: Sequence[Timing]) -> None:
        """The table of ``--time-passes``, once, at the end (also of a failed compile)."""

    def close(self) -> None:
        """No more calls follow."""


class Stopped(Exception):
    """Raised by StageRunner.run after the stage to stop after; StageRunner's `with` absorbs it."""

    def __init__(self, stage: str, result: object) -> None:
        self.stage = stage
        self.result = result
        super().__init__(f"stopped after stage {stage}")


def result_text(value: object) -> str | None:
    """What ``--dump-ir`` writes for a result: as_text() or a TVM module's script; None = nothing to dump."""
    for method in ("as_text", "script"):
        fn = getattr(value, method, None)
        if callable(fn):
            text = fn()
            return text if isinstance(text, str) else None
    return None


@contextmanager
def remembered_interrupts() -> Iterator[list[BaseException]]:
    """The exceptions that signal handlers (Ctrl-C, SIGTERM) raise meanwhile.

    One that passes through TVM, where a pass or a callback in Python was running, comes out as a RuntimeError without a
    cause, and would be taken for a bug.
    """
    raised: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():
        yield raised
        return

    def remember(
        handler: Callable[[int, FrameType | None], object],
    ) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, remember(handler))
        yield raised
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)


class StageRunner:
    """Runs stages one after another. Use it as a context manager, so that the reporter is closed.

    Args:
        spec: goes into a reproducer.
        stages: names of all stages in order, for progress and for checking `stop_after`.
        dump_ir: folder for ``NNN_stage_Name.py`` files, written only when the text changed; None = no dumps.
        time_passes: hand the timings to the reporter at the end.
        stop_after: stop after this stage by raising Stopped; None = run all.
        progress: who is told; None = nobody.

    Raises:
        LlmcError: `stop_after` names no stage; `dump_ir` cannot be written.
    """

    def __init__(
        self,
        spec: CompileSpec,
        *,
        stages: Sequence[str] = STAGES,
        dump_ir: Path | None = None,
        time_passes: bool = False,
        stop_after: str | None = None,
        progress: ProgressReporter | None = None,
    ) -> None:
        if stop_after is not None and stop_after not in stages:
            raise LlmcError(
                "unknown-stage",
                f"There is no stage {stop_after!r}; the stages are {', '.join(stages)}.",
                hint="Give --stop-after one of them.",
            )
        self.spec = spec
        self.stages = tuple(stages)
        self.progress = progress or ProgressReporter()
        self.timings: list[Timing] = []
        self._time_passes = time_passes
        self._stop_after = stop_after
        self._dump_ir = dump_ir
        self._dumped = 0
        self._last_text = ""
        self._done: list[str] = []
        self._interrupts: list[BaseException] = []
        if dump_ir is not None:
            self._prepare_dump(dump_ir)

    def __enter__(self) -> StageRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if self._time_passes:
                self.progress.timings(self.timings)
        finally:
            self.progress.close()
        return isinstance(error, Stopped)

    def run(self, name: str, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run one stage and return its result.

        Raises:
            LlmcError: what the stage raised; anything else becomes ``internal-error``, naming the reproducer.
            Stopped: this was the stage to stop after.
        """
        number = self.stages.index(name) + 1 if name in self.stages else 0
        self.progress.stage_started(name, number, len(self.stages))
        with remembered_interrupts() as self._interrupts:
            result = self._timed(name, "", args[0] if args else None, fn, *args, **kwargs)
        self.progress.stage_finished(self.timings[-1])
        for part in result if isinstance(result, tuple) else (result,):
            self.dump(name, type(part).__name__, part)
        if name == self._stop_after:
            raise Stopped(name, result)
        return result

    def run_pass(self, stage: str, name: str, fn: Callable[[U], T], value: U) -> T:
        """Run one pass of a stage: timed, dumped if it changed the text, reproducible if it fails."""
        result = self._timed(stage, name, value, fn, value)
        self.dump(stage, name, result)
        return result

    def dump(self, stage: str, name: str, value: object) -> None:
        """Write `value` to the dump folder if there is one and its text differs from the last dump's."""
        if self._dump_ir is None:
            return
        text = result_text(value)
        if text is None or text == self._last_text:
            return
        self._last_text = text
        path = self._dump_ir / f"{self._dumped:03d}_{stage}_{name}.py"
        self._dumped += 1
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as e:
            raise LlmcError("dump-unwritable", f"The dump {path} cannot be written: {e.strerror}.") from None

    def _timed(
        self, stage: str, part: str, before: object, fn: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        label = f"{stage}/{part}" if part else stage
        start = time.perf_counter()
        try:
            result = fn(*args, **kwargs)
        except (LlmcError, Stopped):
            raise
        except Exception as e:
            if self._interrupts:
                raise self._interrupts[0] from None
            folder = write_reproducer(self.spec, label, self._done, result_text_safe(before), before, e)
            raise LlmcError(
                "internal-error",
                f"{'Pass' if part else 'Stage'} {label} failed with {type(e).__name__}: {first_line(e)}"
                f" (ran before it: {', '.join(self._done) or 'nothing'}). A reproducer is in {folder}.",
                hint="This is a bug in llmc; please report it with that folder.",
                context={"stage": label, "reproducer": str(folder)},
            ) from e
        self._done.append(label)
        self.timings.append(Timing(stage, part, time.perf_counter() - start, peak_rss()))
        return result

    def _prepare_dump(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # dumps of an earlier compile would be read as this one's
            for old in folder.glob("[0-9][0-9][0-9]_*.py"):
                old.unlink()
        except OSError as e:
            raise LlmcError(
                "dump-unwritable", f"The folder {folder} cannot be written: {e.strerror}."
            ) from None


def run_passes(
    runner: StageRunner, stage: str, passes: Iterable[tuple[str, Callable[[T], T]]], module: T
) -> T:
    """Run an ordered table of (name, pass) over `module`, each timed, dumped and reproducible."""
    for name, fn in passes:
        module = runner.run_pass(stage, name, fn, module)
    return module


def result_text_safe(value: object) -> str | None:
    """result_text, but None where printing itself fails: the first failure is the one to report."""
    try:
        return result_text(value)
    except Exception:
        return None


def first_line(error: BaseException) -> str:
    """What an exception says in one line, without a trailing full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # tvm's schedule errors say what is wrong behind a listing of the whole function
    said = [line.removeprefix("Error message: ") for line in lines if line.startswith("Error message: ")]
    return (said or lines or ["no message"])[0].rstrip(".")
