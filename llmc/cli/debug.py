"""``llmc debug``: tools that look inside a compile."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from llmc.cli.format import human_bytes
from llmc.spec import CompileSpec


def run_simulate(
    model: str, *, target: str, dtype: str | None, tokens: int, decode: int, races: bool, seed: int
) -> None:
    """Print what each simulated kernel did, and how far the logits are from torch's.

    Raises:
        LlmcError: see llmc.simulate.model.simulate_model.
    """
    from llmc.simulate.model import simulate_model

    given = {"model": model, "target": target, "dtype": dtype}
    spec = CompileSpec.from_json({k: v for k, v in given.items() if v is not None})
    report = simulate_model(model, spec, tokens=tokens, decode=decode, races=races, seed=seed)
    table = Table(title="simulated kernels", title_justify="left", box=None, pad_edge=False)
    for column in ("kernel", "calls", "launches", "blocks", "barriers", "shared", "seconds"):
        table.add_column(column, overflow="fold")
    for name, use in sorted(report.kernels.items(), key=lambda item: -item[1].seconds):
        counts = (use.calls, use.launches, use.blocks, use.barriers)
        table.add_row(name, *map(str, counts), human_bytes(use.shared_bytes), f"{use.seconds:.2f}")
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    noise = f"; the source itself rounds to {report.noise:.2e}" if report.noise is not None else ""
    console.print(
        f"{report.tokens} tokens: largest logit error {report.error:.2e} of {report.largest:.2e}{noise}; "
        f"no access out of bounds, no divergent barrier{', no race' if races else '; races were not looked for'}"
    )
