"""``llmc inspect``: an artifact's manifest as tables or JSON."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmc.artifact import DeviceCode, Manifest, ParamEntry
from llmc.cli.compile import quality_text, text_quality_text
from llmc.cli.format import grid, human_bytes, human_count
from llmc.cli.kernels import kernel_tables
from llmc.errors import LlmcError
from llmc.inspect import ArtifactReport, inspect
from llmc.kv_plan import KVKind
from llmc.runtime.levels import choose_level, missing_features

# how a quantized weight's layout begins; see llmc/schedules/qlayout.py
_QUANTIZED = re.compile(r"quant\((\w+),n=\d+,of=(\d+)x(\d+)\)")
# parameters listed without --params
_SOME = 12
_WIDE = 160  # columns of what does not go to a terminal


def run_inspect(
    path: Path,
    *,
    as_json: bool,
    all_params: bool,
    kernels: bool = False,
    context: int | None = None,
) -> None:
    """Print the artifact at `path`.

    Args:
        kernels: print the kernels of its functions instead, for sequences of `context` tokens (default: 1024, or as
            many as the artifact takes), and what a device's assembler said of them.

    Raises:
        LlmcError: see llmc.inspect.inspect; an artifact that does not list its kernels; a context that is too long.
    """
    if context is not None and not kernels:
        raise LlmcError("context", "--context is for the table of kernels.", hint="Add --kernels.")
    report = inspect(path)
    if as_json:
        print(report.manifest.as_text())
        return
    # tables are not cut when they go to a file
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    if kernels:
        for table in kernel_tables(report.manifest, context):
            console.print(table)
            console.print()
        if report.manifest.device is not None:
            console.print(device_table(report.manifest.device))
        return
    for table in (
        overview(report),
        *([levels_table(report.manifest)] if report.manifest.lower_levels else []),
        functions_table(report.manifest),
        kv_table(report.manifest),
        params_table(report.manifest, all_params),
        files_table(report),
        versions_table(report.manifest),
    ):
        console.print(table)
        console.print()
    for problem in report.problems:
        console.print(f"[bold red]problem:[/bold red] {problem}")


def overview(report: ArtifactReport) -> Table:
    """Model, target, limits, quality."""
    m = report.manifest
    table = grid(f"artifact {report.folder}")
    table.add_row(
        "model",
        f"{m.model.source}: {m.model.architecture} ({m.model.model_type}), {m.model.layers} layers, "
        f"{human_count(m.model.parameters)} parameters, vocabulary {m.model.vocab_size}, {m.model.dtype}",
    )
    table.add_row("target", f"{m.target.preset} ({m.target.triple}, {m.target.mcpu})")
    table.add_row("needs", " ".join(m.target.features) or "no extra CPU features")
    table.add_row(
        "limits",
        f"{m.limits.max_seq_len} tokens per sequence, {m.limits.max_batch} sequences and "
        f"{m.limits.max_step_tokens} tokens per step",
    )
    if m.device is not None:
        table.add_row("device code", device_text(m.device))
    table.add_row("quality", quality_text(m.quality))
    if m.quality.text is not None:
        table.add_row("on a text", text_quality_text(m.quality.text))
    table.add_row("tuning", f"{len(m.tuning_records)} records" if m.tuning_records else "default schedules")
    if bits := bits_per_weight(m):
        table.add_row("weights", bits)
    table.add_row("created", m.created)
    return table


def levels_table(manifest: Manifest) -> Table:
    """Levels of processor features, best first; which one this machine takes, and what the check said of each."""
    taken, problem = "", ""
    try:
        taken = choose_level(manifest).name
    except LlmcError as e:
        problem = e.message
    table = _table("levels", "level", "library", "needs", "here", "tuning", "quality")
    for level in manifest.levels:
        missing = missing_features(level.target)
        lacks = f"lacks {', '.join(missing)}" if missing else "not known" if missing is None else "can run"
        table.add_row(
            level.name,
            level.library,
            " ".join(level.target.features),
            "[bold]taken[/bold]" if level.name == taken else lacks,
            f"{len(level.tuning_records)} records" if level.tuning_records else "default schedules",
            quality_text(level.quality),
        )
    if problem:
        table.caption, table.caption_justify = problem, "left"
    return table


def device_text(device: DeviceCode) -> str:
    """Architectures, compiler and the worst kernel in a line."""
    images = ", ".join(f"{i.arch} ({i.format})" for i in device.images)
    spilling = [k for k in device.kernels if k.spill_bytes]
    most = max((k.registers for k in device.kernels), default=0)
    return (
        f"{images} by {device.compiler}; {len(device.kernels)} kernels, at most {most} registers, "
        f"{len(spilling)} with spills; --kernels lists them"
    )


def device_table(device: DeviceCode) -> Table:
    """The device's kernels as the assembler reports them: one of the tables above becomes one or several launches."""
    table = _table("device code", "kernel", "arch", "registers", "shared", "stack", "spilled")
    for k in sorted(device.kernels, key=lambda k: (k.arch, k.name)):
        table.add_row(
            k.name,
            k.arch,
            str(k.registers),
            human_bytes(k.shared_bytes),
            human_bytes(k.stack_bytes),
            human_bytes(k.spill_bytes),
        )
    return table


def bits_per_weight(manifest: Manifest) -> str:
    """Quantized schemes with what they store per weight; "" if there are none."""
    held: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for p in manifest.params:
        if match := _QUANTIZED.match(p.layout):
            scheme, rows, columns = match[1], int(match[2]), int(match[3])
            held[scheme] += (p.shape[0] if len(p.shape) == 3 else 1) * rows * columns
            stored[scheme] += 8 * p.nbytes
    if not held:
        return ""
    each = ", ".join(f"{s} {human_count(n)} at {stored[s] / n:.2f} bits" for s, n in held.most_common())
    total = 8 * sum(p.nbytes for p in manifest.params) / manifest.model.parameters
    return f"{total:.2f} bits per weight of the source ({each})"


def functions_table(manifest: Manifest) -> Table:
    """The compiled functions with their arguments' shapes."""
    table = _table("functions", "function", "argument", "dtype", "shape")
    first = {(f.inputs, f.outputs): f.name for f in reversed(manifest.functions)}
    for function in manifest.functions:
        name = f"[bold]{function.name}[/bold]"
        same = first[function.inputs, function.outputs]
        if same != function.name:
            table.add_row(name, f"as {same}", "", "")
            continue
        for spec in function.inputs:
            table.add_row(name, spec.name, spec.dtype, _shape(spec.shape))
            name = ""
        for spec in function.outputs:
            table.add_row("", f"-> {spec.name}", spec.dtype, _shape(spec.shape))
    return table


def kv_table(manifest: Manifest) -> Table:
    """The KV-cache plan, one row per group of layers."""
    plan = manifest.kv_plan
    table = _table(
        f"KV cache: pages of {plan.page_size} tokens, {human_bytes(plan.bytes_per_token())} per token",
        "group", "kind", "layers", "kv heads", "key dim", "value dim", "dtype", "page",
    )  # fmt: skip
    for group in plan.groups:
        kind = group.kind.value
        if group.kind in (KVKind.SLIDING_WINDOW, KVKind.CHUNKED):
            kind += f" {group.window}"
        if group.latent:
            kind += ", latent"
        if group.sink_tokens:
            kind += f" + {group.sink_tokens} sink tokens"
        table.add_row(
            group.name,
            kind,
            f"{len(group.layers)} ({_ranges(group.layers)})",
            str(group.kv_heads),
            str(group.key_dim),
            f"{group.value_dim} of the key" if group.latent else str(group.value_dim),
            group.dtype,
            human_bytes(group.page_bytes(plan.page_size)),
        )
    if plan.shared:
        table.caption = "shared: " + ", ".join(f"layer {a} reads layer {b}'s" for a, b in plan.shared)
    return table


def params_table(manifest: Manifest, everything: bool) -> Table:
    """The packed weights."""
    params = manifest.params
    total = sum(p.nbytes for p in params)
    dtypes = Counter[str]()
    for p in params:
        dtypes[p.dtype] += p.nbytes
    shares = ", ".join(f"{name} {human_bytes(size)}" for name, size in dtypes.most_common())
    table = _table(
        f"parameters: {len(params)} tensors, {human_bytes(total)} ({shares})",
        "name", "shape", "dtype", "layout", "size", "shard",
    )  # fmt: skip
    shown = params if everything or len(params) <= _SOME else params[:_SOME]
    for p in shown:
        table.add_row(*_param_row(p))
    if len(shown) < len(params):
        table.caption = f"{len(params) - len(shown)} more; --params lists all"
        table.caption_justify = "left"
    return table


def files_table(report: ArtifactReport) -> Table:
    """The files with sizes and the start of their hashes."""
    table = _table(f"files: {human_bytes(sum(report.sizes.values()))}", "file", "size", "sha256")
    for name, size in report.sizes.items():
        table.add_row(name, human_bytes(size), report.manifest.files.get(name, "")[:16])
    return table


def versions_table(manifest: Manifest) -> Table:
    """What compiled it."""
    table = grid("versions")
    table.add_row("llmc", manifest.llmc_version)
    table.add_row("tvm", manifest.tvm_version)
    for name, version in sorted(manifest.versions.items()):
        table.add_row(name, version)
    return table


def _param_row(p: ParamEntry) -> tuple[str, ...]:
    return p.name, _shape(p.shape), p.dtype, p.layout, human_bytes(p.nbytes), p.shard


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shape(shape: tuple[str | int, ...]) -> str:
    return "x".join(str(s) for s in shape) or "scalar"


def _ranges(numbers: tuple[int, ...]) -> str:
    """``(0, 1, 2, 4) -> '0-2, 4'``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
