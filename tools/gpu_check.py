"""Everything about the cuda target that needs a GPU, in one command: right numbers, then speed beside the targets, as a table.

    python tools/gpu_check.py --prepare DIR                 # anywhere with llmc's compiler; no GPU: builds what is needed
    python tools/gpu_check.py --prepared DIR --json F       # where the GPU is: a driver, torch, transformers, this tree
    python tools/gpu_check.py --prepared DIR --only gemm,quant --budget 540
    python tools/gpu_check.py --json F --report             # the table of what is in F already

Each section runs in a process of its own with a limit of time, and writes what it finds as it goes: a crash, a kernel that
hangs or the end of the budget costs one section. A second call with the same --json goes on with the sections that are
missing. On a machine that also has llmc's compiler, --prepared may be left out: it is prepared first.

``--device simulator`` (with ``--prepare`` too) runs every section on small shapes without a GPU, the
kernels in the simulator and the models on the cpu target: the numbers are checked, the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tools.gpu_device import Row
    from tools.gpu_kernels import Session


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        module, function: what runs it.
        seconds: that it may take.
        optional: other people's programs, whose failure is not ours.
    """

    module: str
    function: str
    seconds: float
    optional: bool = False


# in the order in which they run: what others are measured by, what is wrong if numbers are, then the dearest numbers
SECTIONS = {
    "ceilings": Section("gpu_kernels", "ceilings", 60),
    "tokens": Section("gpu_models", "tokens", 90),
    "schemes": Section("gpu_models", "schemes", 120),
    "gemm": Section("gpu_kernels", "gemm", 60),
    "flat": Section("gpu_kernels", "flat", 60),
    "gemv": Section("gpu_kernels", "gemv", 60),
    "quant": Section("gpu_kernels", "quant", 120),
    "integers": Section("gpu_kernels", "integers", 120),
    "experts": Section("gpu_kernels", "experts", 60),
    "prefill": Section("gpu_kernels", "prefill_attention", 90),
    "decode": Section("gpu_kernels", "decode_attention", 60),
    "model-bf16": Section("gpu_models", "model_bf16", 300),
    "model-q4g128": Section("gpu_models", "model_q4", 300),
    "torch": Section("gpu_models", "torch_compiled", 420),
    "vllm": Section("gpu_peers", "vllm", 240, optional=True),
    "trtllm": Section("gpu_peers", "trtllm", 240, optional=True),
}
_LEAST = 20.0  # seconds; with less left no section is begun
_AGAINST_TORCH = 1.2


# -- one section, in its own process ---------------------------------------------------------------------------------------


def run_section(name: str, prepared: Path, device: str, results: Path) -> int:
    """Run a section and append its rows to the results as they come."""
    import importlib

    from tools.gpu_device import Gpu, Simulated
    from tools.gpu_kernels import Session

    section = SECTIONS[name]
    session: Session = Session(Simulated() if device == "simulator" else Gpu(), prepared, read_rows(results))
    measure: Callable[[Session], Iterator[Row]] = getattr(
        importlib.import_module(f"tools.{section.module}"), section.function
    )
    for row in measure(session):
        write_line(results, json.loads(row.to_json()))
        print(text_of(row), flush=True)
    write_line(results, {"done": name})
    return 0


def write_line(results: Path, values: dict[str, object]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(results: Path) -> list[dict[str, object]]:
    """What a results file holds; a last line without an end is what a killed process left."""
    if not results.exists():
        return []
    lines = results.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]


def read_rows(results: Path) -> list[Row]:
    """Rows, of each line of the table the last one."""
    from tools.gpu_device import Row

    rows = [Row(**values) for values in read_lines(results) if "what" in values]  # type: ignore[arg-type]
    return list({(row.section, row.what): row for row in rows}.values())


# -- the command -----------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace, sections: Sequence[str], results: Path) -> int:
    """Run sections one after the other; returns how many failed."""
    end = time.monotonic() + options.budget if options.budget else float("inf")
    done = {str(values["done"]) for values in read_lines(results) if "done" in values}
    failed = 0
    for name in sections:
        if name in done and not options.again:
            print(f"-- {name}: done already")
            continue
        limit = min(SECTIONS[name].seconds * options.patience, end - time.monotonic())
        if limit < _LEAST:
            print(f"-- {name}: no time left")
            failed += not SECTIONS[name].optional
            continue
        print(f"-- {name}", flush=True)
        why = run_process(name, options, results, limit)
        if why:
            failed += not SECTIONS[name].optional
            print(f"   {name} FAILED: {why}", flush=True)
            write_line(results, {"failed": name, "why": why})
    return failed


def run_process(name: str, options: argparse.Namespace, results: Path, limit: float) -> str:
    """Run a section in its own process; "" or why it did not come to its end."""
    command = [sys.executable, str(Path(__file__).resolve()), "--section", name]
    command += ["--prepared", str(options.prepared), "--device", options.device, "--json", str(results)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, cwd=ROOT, env=_environment())
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"no end within {limit:.0f} s"
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if status == 0:
        return ""
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}: {said[-1]}"[:600] if said else how


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def unpack_wheels(prepared: Path, site: Path) -> None:
    """TVM's runtime from the prepared folder, where this Python has none; for this process and its children."""
    import importlib.util

    if importlib.util.find_spec("tvm_ffi") and importlib.util.find_spec("tvm"):
        return
    for path in sorted((prepared / "wheels").glob("*")):
        with zipfile.ZipFile(path) as held:
            held.extractall(site)
    sys.path.insert(0, str(site))


# -- the table -------------------------------------------------------------------------------------------------------------


def text_of(row: Row) -> str:
    target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"
    verdict = {None: "", True: "reached", False: "MISSED"}[row.reached]
    return f"{row.section:13} {row.what:30} {row.value:9.3g} {row.unit:20} {target:>8} {verdict:8} {row.note}"


def table(results: Path) -> str:
    """All rows, what failed, and whether every target was reached."""
    from tools.gpu_device import Row

    rows = read_rows(results)
    rates = {(r.section, r.what): r for r in rows}
    ours, theirs = rates.get(("model-bf16", "decode, batch 1")), rates.get(("torch", "decode, max-autotune"))
    if ours is not None and theirs is not None:
        ratio = ours.facts["tokens_per_second"] / theirs.value
        rows.append(
            Row("model-bf16", "decode against torch.compile", ratio, "x max-autotune", _AGAINST_TORCH)
        )
    rows += [
        Row("model-bf16", f"decode against {name}", ours.facts["tokens_per_second"] / row.value, f"x {name}")
        for name in ("vllm", "trtllm")
        if ours is not None and (row := rates.get((name, "decode, batch 1"))) is not None and row.value
    ]
    lines = [f"{'section':13} {'what':30} {'reached':>9} {'unit':20} {'target':>8} {'':8} figures"]
    order = list(SECTIONS)
    lines += [text_of(row) for row in sorted(rows, key=lambda r: order.index(r.section))]
    ended = {str(v["done"]) for v in read_lines(results) if "done" in v}
    failures = {str(v["failed"]): str(v["why"]) for v in read_lines(results) if "failed" in v}
    for name in SECTIONS:
        if name not in ended:
            lines.append(f"{name:13} {'FAILED: ' + failures[name] if name in failures else 'not run'}")
    aims = [row for row in rows if row.target is not None]
    missed = sum(not row.reached for row in aims)
    lines.append(
        f"{len(aims) - missed} of {len(aims)} targets reached; {len(ended)} of {len(SECTIONS)} sections ran"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="build what is needed, without a GPU")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="what --prepare wrote")
    parser.add_argument(
        "--target", default="", help="with --prepare (default: the GPU here, else cuda/sm_90a)"
    )
    parser.add_argument(
        "--python", default="", help="with --prepare: take along TVM's runtime for this version"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--budget", type=float, default=0, help="seconds for all; 0 = no limit")
    parser.add_argument("--patience", type=float, default=1, help="factor of each section's limit")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.jsonl"), help="results, appended to")
    parser.add_argument("--again", action="store_true", help="also sections that are in the results")
    parser.add_argument("--report", action="store_true", help="only print the table of the results")
    parser.add_argument("--device", choices=("gpu", "simulator"), default="gpu")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sections = [name for name in SECTIONS if name in options.only.split(",")]
    unknown = sorted(set(options.only.split(",")) - set(SECTIONS))
    if unknown:
        print(f"--only takes {', '.join(SECTIONS)}; found {', '.join(unknown)}.", file=sys.stderr)
        return 2
    if options.prepare is not None:
        return _prepare(options, sections, options.prepare)
    if options.section:
        return run_section(options.section, options.prepared, options.device, options.json)
    if options.report:
        print(table(options.json))
        return 0
    return _check(options, sections)


def _prepare(options: argparse.Namespace, sections: Sequence[str], folder: Path) -> int:
    from tools.gpu_device import FULL, TINY
    from tools.gpu_prepare import prepare, runtime_wheels, sizes_of

    told = lambda text: print(text, flush=True)  # noqa: E731
    target = "simulator" if options.device == "simulator" else options.target or default_target()
    prepare(folder, target, TINY if target == "simulator" else FULL, tuple(sections), told)
    if options.python:
        runtime_wheels(folder, options.python, told)
    total, parts = sizes_of(folder)
    told(f"{folder}: {total / 1e6:.1f} MB (" + ", ".join(f"{n} {s / 1e6:.1f}" for n, s in parts) + ")")
    return 0


def default_target() -> str:
    """The preset of the GPU here, with what only its own architecture has; else that of the machine the targets are for."""
    from llmc import cuda_driver
    from llmc.targets.backend import get

    devices = cuda_driver.query().devices
    if not devices:
        return "cuda/sm_90a"
    backend, caps = get("cuda")
    own = f"sm_{devices[0].arch}a"
    return f"cuda/{own}" if own in backend.presets else caps.preset


def _check(options: argparse.Namespace, sections: Sequence[str]) -> int:
    from llmc import cuda_driver

    driver = cuda_driver.query()
    if options.device == "gpu" and not driver.devices:
        print(
            f"gpu_check measures on a GPU, and {driver.problem}. "
            "Here it can --prepare DIR for a machine with one, or run with --device simulator.",
            file=sys.stderr,
        )
        return 2
    if driver.devices:
        print(f"{driver.devices[0].name}, driver for CUDA {driver.version_text}", flush=True)
    with tempfile.TemporaryDirectory(prefix="llmc-gpu-check-") as work:
        if options.prepared is None:
            options.prepared = Path(work) / "prepared"
            if _prepare(options, sections, options.prepared):
                return 2
        if not (options.prepared / "about.json").is_file():
            print(f"{options.prepared} is not what gpu_check --prepare wrote.", file=sys.stderr)
            return 2
        unpack_wheels(options.prepared, Path(work) / "site")
        failed = run_all(options, sections, options.json)
    print()
    print(table(options.json))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
