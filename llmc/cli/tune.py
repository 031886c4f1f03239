"""``llmc tune``: tune the kernels of a model or artifact; list and merge records; build here and measure there."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmc.artifact import MANIFEST
from llmc.cli.progress import reporter
from llmc.cli.tune_view import TuneView, conclusions, next_step, records_tables, result_table
from llmc.errors import LlmcError
from llmc.runtime.levels import choose_level
from llmc.schedules.records import read_records
from llmc.spec import CompileSpec, parse_budget
from llmc.targets.backend import get
from llmc.tune.sources import default_database, merge

if TYPE_CHECKING:
    from llmc.artifact import Limits, Manifest
    from llmc.tune.extract import KernelUse

_LONG = 12 * 3600.0  # measuring candidates ends by itself


@dataclass(frozen=True)
class TuneAction:
    """What ``llmc tune`` is to do beside or instead of tuning.

    Attributes:
        list_records, merge_files: show the database; add files to it first.
        export: file to write candidates to.
        each: candidates per task and bucket in it.
        measure: file of candidates to measure here.
        rpc: HOST:PORT of the machine that measures.
    """

    list_records: bool = False
    merge_files: Sequence[Path] = ()
    export: Path | None = None
    each: int = 32
    measure: Path | None = None
    rpc: str | None = None

    @property
    def needs_no_model(self) -> bool:
        return self.list_records or bool(self.merge_files) or self.measure is not None


def run_tune(
    model: str | None,
    options: dict[str, Any],
    action: TuneAction,
    *,
    budget: str | None,
    spec_file: Path | None,
    records: Path | None,
    quiet: bool,
) -> None:
    """Tune MODEL, or do what `action` says.

    Raises:
        LlmcError: everything that is the user's to correct.
    """
    console = Console(file=sys.stdout, highlight=False)
    database = records or default_database()
    has_model = model is not None or spec_file is not None
    if action.needs_no_model and has_model:
        raise LlmcError(
            "tune-and-list",
            "llmc tune either tunes a model, or lists and merges records, or measures candidates.",
            hint="Run it twice.",
        )
    if not action.needs_no_model and not has_model:
        raise LlmcError(
            "no-model",
            "llmc tune needs a MODEL, an ARTIFACT, --list, --merge or --measure.",
            hint="See llmc tune --help.",
        )
    if action.rpc is not None and (action.needs_no_model or action.export is not None):
        raise LlmcError(
            "tune-rpc",
            "--rpc goes with tuning a MODEL or an ARTIFACT only.",
            hint="Candidates in a file are measured where the file is: llmc tune --measure FILE.",
        )
    seconds = parse_budget(budget) if budget is not None else None
    if action.export is not None:
        _export(model, options, action, spec_file, seconds, records, console, quiet)
        return
    if action.merge_files:
        added, known = merge(database, action.merge_files)
        console.print(f"{database}: {added} records added, {known} were there already", soft_wrap=True)
    if action.list_records:
        console.print(records_tables(database, read_records(database) if database.exists() else []))
    if action.merge_files or action.list_records:
        return
    view = TuneView(Console(stderr=True, highlight=False), live=sys.stderr.isatty(), quiet=quiet)
    name = "MODEL"
    if action.measure is not None:
        from llmc.tune.session import measure_candidates

        measure_candidates(action.measure, budget=seconds or _LONG, database=database, progress=view)
    elif seconds is None:
        raise LlmcError("tune-budget", "llmc tune needs a budget of time.", hint="Add --budget 10m.")
    elif _is_artifact(model) or action.rpc is not None:
        name = name if _is_artifact(model) else model or name
        _tune_uses(_uses(model, options, spec_file), seconds, database, view, action.rpc)
    else:
        name = model or name
        _tune_model(model, options, spec_file, seconds, database, view, quiet)
    if view.result is None:
        return
    if not quiet:
        console.print(result_table(view.result))
    own = options if name == model and not _is_artifact(model) else {}
    for line in (*conclusions(view.result), next_step(name, own, database)):
        console.print(line, soft_wrap=True)


def _is_artifact(model: str | None) -> bool:
    return model is not None and (Path(model) / MANIFEST).exists()


def _spec(model: str | None, options: dict[str, Any], spec_file: Path | None, **more: Any) -> CompileSpec:
    """For a compile up to the tuning, without weights."""
    given = {key: value for key, value in {**options, "model": model}.items() if value is not None}
    given |= {"meta_weights": True, "verify": "off", **more}
    spec = CompileSpec.from_toml(spec_file, **given) if spec_file else CompileSpec.from_json(given)
    return spec.with_(eval_text=None, max_kl=None, max_ppl_increase=None)


def _export(
    model: str | None,
    options: dict[str, Any],
    action: TuneAction,
    spec_file: Path | None,
    seconds: float | None,
    records: Path | None,
    console: Console,
    quiet: bool,
) -> None:
    """Build candidates into a file."""
    from llmc.tune.session import export_kernels

    assert action.export is not None
    if action.each < 1:
        raise LlmcError(
            "tune-candidates",
            f"--candidates must be at least 1; found {action.each}.",
            hint="32 take a few minutes per kernel.",
        )
    found = _uses(model, options, spec_file)
    backend, caps = get(found.target)
    done = export_kernels(
        found.uses,
        backend,
        caps,
        max_batch=found.limits.max_batch,
        max_step_tokens=found.limits.max_step_tokens,
        path=action.export,
        each=action.each,
        budget=seconds,
        database=records,
        told=(lambda text: None) if quiet else lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    console.print(
        f"{action.export}: {done.candidates} candidates of {done.jobs} tasks for {caps.preset}"
        + (f"; {sum(done.failures.values())} were not built" if done.failures else ""),
        soft_wrap=True,
    )
    console.print(f"measure them there: llmc tune --measure {action.export.name}", soft_wrap=True)


def _tune_model(
    model: str | None,
    options: dict[str, Any],
    spec_file: Path | None,
    seconds: float,
    database: Path,
    view: TuneView,
    quiet: bool,
) -> None:
    """Compile up to the tuning, without weights."""
    spec = _spec(model, options, spec_file, tune=seconds, records=str(database))
    from llmc.pipeline import compile_model

    show = reporter(quiet)
    view.beside(show)
    with tempfile.TemporaryDirectory(prefix="llmc-") as nowhere:
        compile_model(
            spec.model,
            Path(nowhere) / "stopped",
            spec=spec,
            stop_after="tune",
            progress=show,
            tune_progress=view,
        )


@dataclass(frozen=True)
class _Uses:
    """The kernels of a model or an artifact, its bounds and its target."""

    uses: Sequence[KernelUse]
    limits: Limits
    target: str


def _uses(model: str | None, options: dict[str, Any], spec_file: Path | None) -> _Uses:
    """Of an artifact, whose target and dtypes are decided; or of a model, lowered without weights."""
    from llmc.pipeline.lower import lower_model
    from llmc.pipeline.source import limits_of
    from llmc.tune.extract import KernelUse, kernel_uses

    if _is_artifact(model):
        manifest = _decided(Path(str(model)), options)
        uses = [KernelUse.from_json(use) for use in manifest.tasks]
        return _Uses(uses, manifest.limits, manifest.target.preset)
    spec = _spec(model, options, spec_file)
    source, step, _ = lower_model(spec.model, spec)
    return _Uses(kernel_uses(step.module), limits_of(spec, source), spec.target)


def _tune_uses(found: _Uses, seconds: float, database: Path, view: TuneView, rpc: str | None) -> None:
    from llmc.tune.session import tune_kernels

    backend, caps = get(found.target)
    tune_kernels(
        found.uses,
        backend,
        caps,
        max_batch=found.limits.max_batch,
        max_step_tokens=found.limits.max_step_tokens,
        budget=seconds,
        database=database,
        progress=view,
        rpc=rpc,
    )


def _decided(path: Path, options: dict[str, Any]) -> Manifest:
    """The manifest of an artifact, which decides target and dtypes.

    Raises:
        LlmcError: options ask for something else.
    """
    from llmc.inspect import inspect

    whole = inspect(path).manifest
    asked = str(options.get("target") or "")
    named = asked if asked in {level.target.preset for level in whole.levels} else ""
    manifest = whole.at(choose_level(whole, named)) if whole.lower_levels else whole
    given = [key for key, value in options.items() if value is not None and key != "target"]
    if given or options.get("target") not in (None, manifest.target.target, manifest.target.preset):
        raise LlmcError(
            "artifact-is-decided",
            f"The artifact {path} is compiled for {manifest.target.preset} with its own dtypes; "
            f"found options for another ({', '.join(given) or 'target'}).",
            hint="Leave them out, or tune the model instead of the artifact.",
        )
    return manifest
