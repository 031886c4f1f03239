"""``llmc inspect --kernels``: what each compiled function calls."""

from __future__ import annotations

from rich.table import Table

from llmc.artifact import FunctionEntry, Manifest
from llmc.cli.format import human_bytes, human_count
from llmc.errors import LlmcError
from llmc.inspect import kernel_figures
from llmc.kernel_work import Formula, Workload

_CONTEXT = 1024
_DECODE = "decode"


def kernel_tables(manifest: Manifest, context: int | None) -> list[Table]:
    """A table for ``decode`` (one sequence of `context` tokens) and one for ``step`` (a prompt).

    Raises:
        LlmcError: the manifest lists no kernels; a context that the artifact cannot hold.
    """
    if not any(f.kernels for f in manifest.functions):
        raise LlmcError(
            "no-kernels",
            f"The manifest lists no kernels; it was written by llmc {manifest.llmc_version} before they were counted.",
            hint="Compile the model again.",
        )
    longest = manifest.limits.max_seq_len
    if context is not None and not 1 <= context <= longest:
        raise LlmcError(
            "context", f"--context must be 1 to {longest} for this artifact, found {context}.",
            hint=f"Use --context {longest} or less.",
        )  # fmt: skip
    context = context or min(_CONTEXT, longest)
    prompt = min(context, manifest.limits.max_step_tokens)
    tables = []
    for function in sorted(manifest.functions, key=lambda f: f.name != _DECODE):
        if function.name == _DECODE:
            work, sizes = Workload.decode(1, context), f"1 sequence of {context} tokens"
        else:
            work, sizes = Workload.prefill(prompt), f"a prompt of {prompt} tokens"
        tables.append(_table(function, work, sizes))
    return tables


def _table(function: FunctionEntry, work: Workload, sizes: str) -> Table:
    figures = kernel_figures(function, work)
    calls = sum(f.entry.calls for f in figures)
    block = sum(f.entry.block_calls for f in figures)
    per_block = f"{block:.3g} per block, " if block else ""
    table = Table(
        title=f"{function.name}: {calls} kernels per step, {per_block}for {sizes}",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for column in ("kernel", "class"):
        table.add_column(column, overflow="fold")
    for column in ("calls", "per block", "bytes", "operations"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("bytes =", "operations ="):
        table.add_column(column, overflow="fold")
    for f in figures:
        table.add_row(
            f.entry.name,
            f.entry.kind,
            str(f.entry.calls),
            f"{f.entry.block_calls:.3g}" if f.entry.block_calls else "",
            human_bytes(f.moved_at),
            human_count(round(f.operations_at)),
            formula_text(f.moved),
            formula_text(f.operations),
        )
    moved = sum(f.moved_at * f.entry.calls for f in figures)
    operations = sum(f.operations_at * f.entry.calls for f in figures)
    table.add_section()
    table.add_row(
        "all calls", "", str(calls), f"{block:.3g}" if block else "", human_bytes(moved), human_count(round(operations))
    )  # fmt: skip
    table.caption = (
        "T tokens, B sequences, R rows of logits, C cached tokens and P pairs of query and key that are seen "
        "(C64: within a window of 64)"
    )
    table.caption_justify = "left"
    return table


def formula_text(formula: Formula) -> str:
    """A formula with short numbers; "" if it is constant."""
    if formula.is_constant:
        return ""
    return " + ".join(
        human_count(round(factor)).replace(" ", "") + (f" {symbols}" if symbols else "")
        for symbols, factor in formula.terms
    )
