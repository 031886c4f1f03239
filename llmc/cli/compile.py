"""``llmc compile``: resolve the spec, compile, say what came out."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llmc.artifact import MANIFEST, Manifest, QualityReport, TextQuality, is_library
from llmc.cli.format import grid, human_bytes, human_count
from llmc.cli.progress import reporter, summed
from llmc.errors import LlmcError
from llmc.spec import CompileSpec
from llmc.stages import STAGES, Timing
from llmc.writer import check_output

if TYPE_CHECKING:
    from llmc.quant.choose import QuantSearch


def run_compile(
    options: dict[str, Any],
    *,
    spec_file: Path | None,
    output: Path | None,
    dump_ir: Path | None,
    time_passes: bool,
    stop_after: str | None,
    quiet: bool,
    plot: Path | None = None,
) -> None:
    """Compile with the options that are not None over those of `spec_file`.

    Raises:
        LlmcError: everything that is the user's to correct.
    """
    given = {key: value for key, value in options.items() if value is not None}
    spec = CompileSpec.from_toml(spec_file, **given) if spec_file else _spec_from_options(given)
    if stop_after is not None and stop_after not in STAGES:
        raise LlmcError(
            "unknown-stage",
            f"There is no stage {stop_after!r}; the stages are {', '.join(STAGES)}.",
            hint="Give --stop-after one of them.",
        )
    if plot is not None and not spec.searches:
        raise LlmcError(
            "plot-without-search", "--plot draws the search of --quant auto, which was not asked for."
        )
    if output is None and stop_after is None:
        raise LlmcError("no-output", "llmc compile needs an output folder.", hint="Add -o DIR.")
    if output is not None:
        check_output(output)
    console = Console(file=sys.stdout, highlight=False)
    if not quiet:
        console.print(spec_table(spec, output))
    show = reporter(quiet)
    # torch and tvm come in here, after everything that can be refused without them
    from llmc.pipeline import compile_model

    view = None
    if spec.tune is not None:
        from llmc.cli.tune_view import TuneView

        view = TuneView(Console(stderr=True, highlight=False), live=sys.stderr.isatty(), quiet=quiet)
        view.beside(show)
    with tempfile.TemporaryDirectory(prefix="llmc-") if output is None else nullcontext("") as nowhere:
        result = compile_model(
            spec.model,
            output or Path(nowhere) / "stopped",
            spec=spec,
            dump_ir=dump_ir,
            time_passes=time_passes,
            stop_after=stop_after,
            progress=show,
            tune_progress=view,
        )
    if view is not None and view.result is not None and not quiet:
        from llmc.cli.tune_view import conclusions, result_table

        console.print(result_table(view.result))
        for line in conclusions(view.result):
            console.print(line, soft_wrap=True)
    if result is not None and result.search is not None:
        show_search(result.search, console, plot, quiet=quiet)
    if quiet:
        return
    if stop_after is not None:
        console.print(f"stopped after stage {stop_after}; no artifact was written")
    elif output is not None:
        console.print(summary_table(output, show.finished))


def show_search(found: QuantSearch, console: Console, plot: Path | None, *, quiet: bool) -> None:
    """What the search of ``--quant auto`` measured and chose."""
    from llmc.cli.quant_auto import choice_table, measured_table, write_plot

    said = write_plot(found, plot) if plot is not None else ""
    if not quiet:
        console.print(measured_table(found))
        console.print(choice_table(found))
        if said:
            console.print(said)


def _spec_from_options(given: dict[str, Any]) -> CompileSpec:
    if "model" not in given:
        raise LlmcError("no-model", "llmc compile needs a MODEL or --spec.", hint="See llmc compile --help.")
    return CompileSpec.from_json(given)


def spec_table(spec: CompileSpec, output: Path | None) -> Table:
    """The resolved spec, one key per row, with what a missing value will resolve to."""
    absent = {
        "dtype": "the checkpoint's",
        "kv_dtype": "same as dtype",
        "max_seq_len": "the model's",
        "revision": "default",
        "calib_text": "none",
        "eval_text": "none",
        "max_kl": "no bound",
        "max_ppl_increase": "no bound",
        "quant_head": "8 bits if quant has 4 or fewer, else as quant",
        "quant_embedding": "not quantized",
        "prune": "no",
        "svd": "no",
        "records": "those shipped with llmc",
        "tune": "no",
    }
    table = grid(f"spec {spec.hash()}")
    for key, value in spec.to_json().items():
        shown = f"{value:g} s" if key == "tune" and value is not None else str(value)
        table.add_row(key, absent.get(key, "") if value is None else shown)
    table.add_row("output", str(output) if output else "none")
    return table


def summary_table(output: Path, finished: list[Timing]) -> Table:
    """Sizes, times, quality and path of a new artifact."""
    manifest = Manifest.from_text((output / MANIFEST).read_text(encoding="utf-8"), str(output / MANIFEST))
    sizes = {p.name: p.stat().st_size for p in output.iterdir() if p.is_file()}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    table = grid("artifact")
    table.add_row(
        "model", f"{manifest.model.architecture}, {human_count(manifest.model.parameters)} parameters"
    )
    table.add_row("target", manifest.target.preset)
    for level in manifest.lower_levels:
        table.add_row("and", f"{level.target.preset}: {quality_text(level.quality)}")
    images = {image.file for image in manifest.device.images} if manifest.device else set()
    code = sum(size for name, size in sizes.items() if is_library(name) or name in images)
    table.add_row(
        "size",
        f"{human_bytes(sum(sizes.values()))} (weights {human_bytes(weights)}, code {human_bytes(code)})",
    )
    table.add_row("KV cache", f"{human_bytes(manifest.kv_plan.bytes_per_token())} per token")
    table.add_row(
        "time",
        f"{sum(t.seconds for t in finished):.1f} s ("
        + ", ".join(f"{t.stage} {t.seconds:.1f}" for t in summed(finished))
        + f"), peak memory {human_bytes(max((t.peak_rss for t in finished), default=0))}",
    )
    table.add_row("schedules", schedules_text(manifest))
    table.add_row("quality", quality_text(manifest.quality))
    if manifest.quality.text is not None:
        table.add_row("on a text", text_quality_text(manifest.quality.text))
    table.add_row("output", str(output))
    return table


def schedules_text(manifest: Manifest) -> str:
    """How many kernels have schedules that were measured."""
    tasks = {(r["rule"], json.dumps(r["task"], sort_keys=True), r["preset"]) for r in manifest.tuning_records}
    if not tasks:
        return "defaults: no tuning record is of a kernel of this model, or none beats the defaults"
    kernels = f"{len(tasks)} kernel{'s' * (len(tasks) > 1)}"
    return f"of {kernels} chosen by {len(manifest.tuning_records)} tuning records, else defaults"


def quality_text(quality: QualityReport) -> str:
    """The quality report in a line."""
    if quality.mode == "off":
        return "not checked" + (f" ({quality.note})" if quality.note else "")
    parts = [f"checked ({quality.mode}, {quality.tokens} tokens)"]
    errors = {"prefill": quality.prefill_max_abs_error, "decode": quality.decode_max_abs_error}
    shown = ", ".join(f"{name} {error:.2e}" for name, error in errors.items() if error is not None)
    # rounding dominates below float32, so there the relative error is what has a bound (llmc/verify.py)
    coarse = quality.reference_noise is not None
    bound = "" if quality.tolerance is None else f" of {quality.tolerance:.2e} allowed"
    parts.append(f"largest logit error {shown}" + ("" if coarse else bound))
    if quality.relative_error is not None:
        parts.append(f"relative error {quality.relative_error:.2e}" + (bound if coarse else ""))
    if coarse:
        parts.append(f"the source itself rounds to {quality.reference_noise:.2e}")
    if quality.top1_agreement is not None:
        parts.append(f"same top token {100 * quality.top1_agreement:.1f} %")
    if quality.quant_kl_mean is not None and quality.quant_top1_agreement is not None:
        parts.append(
            f"quantization: KL divergence {quality.quant_kl_mean:.2e}, same top token "
            f"{100 * quality.quant_top1_agreement:.1f} % on these random tokens"
        )
    if quality.note:
        parts.append(quality.note)
    return ", ".join(parts)


def text_quality_text(text: TextQuality) -> str:
    """The evaluation on a text in a line."""
    parts = [
        f"perplexity {text.perplexity:.4f}, the source's {text.source_perplexity:.4f} "
        f"({text.increase_percent:+.3f} % ± {text.increase_error:.3f}, {text.tokens} tokens)",
        f"KL divergence {text.kl_mean:.3g} (99th percentile {text.kl_p99:.3g})",
        f"same top token {100 * text.top1_agreement:.2f} %",
    ]
    if text.layers:
        worst = max(text.layers, key=lambda layer: layer.error)
        parts.append(f"largest layer error {worst.error:.2e} ({worst.path})")
    if text.note:
        parts.append(text.note)
    return ", ".join(parts)
