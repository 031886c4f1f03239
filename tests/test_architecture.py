"""The shape of the tree: who may import whom, what the wheel ships, where the environment is read."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# folders at the root that install and import as llmc.NAME
MAPPED = ("passes", "schedules", "runtime", "targets")

# base modules: the standard library and each other; `ir` wraps tvm for all compiler code
BASE = (
    "errors",
    "knobs",
    "caps",
    "spec",
    "ops",
    "kv_plan",
    "artifact",
    "ir",
    "host",
    "kernel_work",
    "cuda_driver",
    "sample_layout",
)
# what the driver is made of, beside the pipeline; each may be imported by pipeline and cli
DRIVER = ("stages", "reproducer", "shards", "link", "writer", "packing", "emulated", "inspect", "doctor")
CAPTURE_PASSES = ("rewrite", "raise_attention", "match_attention", "resolve_mask", "relax_eval")
COMPILER = (
    "frontend",
    "quant",
    "passes",
    "schedules",
    "targets",
    "runtime",
    "verify",
    "verify_compare",
    "products",
    "cache_rounding",
    "reference",
    "debug_taps",
    "evaluate",
    "evaluate_text",
    "gate",
    "quantized_source",
)

# module or package of llmc -> modules of llmc that it may import (itself and what lies below it always)
ALLOWED: dict[str, set[str]] = {
    **{name: set(BASE) for name in BASE},
    "spec": {*BASE, "quant.schemes", "quant.shrink"},
    # a capture ends with the passes that make a ModelGraph of what was exported: masks resolved, attention raised
    # and a checkpoint that is quantized already is opened by its reader
    "frontend": {*BASE, *(f"passes.{name}" for name in CAPTURE_PASSES), "quant.readers", "quant.shrink"},
    # the scheme table and the canonical quantized weight (numpy); the methods of llmc.quant see the source model
    "quant.schemes": {"errors"},
    "quant.shrink": {"errors"},
    "quant.weight": {"quant.schemes"},
    "quant.auto": {"errors"},
    "quant.readers": {
        *BASE,
        "quant.schemes",
        "quant.weight",
        "frontend.tensor_files",
        "frontend.weights",
    },
    "products": {"quant.schemes"},
    "cache_rounding": {"kv_plan"},
    "quant": {*BASE, "evaluate", "frontend", "products", "reference"},
    "schedules": {*BASE, "quant.schemes", "quant.weight"},
    "passes": {*BASE, "schedules", "frontend.graph", "quant.schemes"},
    # the tuner's runner places weights as the runtime does
    "targets": {*BASE, "link", "passes", "schedules", "runtime.cuda", "runtime.library", "runtime.memory"},
    "runtime": {"artifact", "cuda_driver", "errors", "host", "knobs", "kv_plan", "sample_layout"},
    # kernels come in lowered; running a whole step needs what lowers and lays out
    "simulate": {
        *BASE,
        "passes",
        "schedules",
        "targets",
        "frontend",
        "quant",
        "packing",
        "pipeline",
        "reference",
        "runtime",
    },
    "reproducer": set(BASE),
    # kernels that measure the machine, run as the runtime runs kernels
    "limits": {*BASE, "runtime.library", "runtime.memory", "schedules", "targets"},
    "stages": {*BASE, "reproducer", "runtime.memory"},
    "shards": set(BASE),
    "link": {*BASE, "runtime.embedded"},
    "emulated": {*BASE, "runtime.model"},
    "writer": {*BASE, "shards", "link"},
    "packing": {
        *BASE,
        "frontend.graph",
        "passes.fold_weights",
        "passes.step_module",
        "schedules.layout",
        "schedules.qlayout",
        "quant",
    },
    "inspect": {*BASE, "runtime.embedded"},
    "doctor": {*BASE, "link", "targets"},
    "verify": {*BASE, "frontend", "runtime", "reference", "verify_compare"},
    "verify_compare": set(BASE),
    "quantized_source": {
        *BASE,
        "frontend.graph",
        "passes.step_module",
        "products",
        "quant.weight",
        "quant.schemes",
        "schedules.qlayout",
    },
    "reference": {*BASE, "cache_rounding", "frontend", "products"},
    "evaluate": set(BASE),
    # the source model comes in lazily: evaluating an artifact alone needs the runtime only
    "evaluate_text": {*BASE, "evaluate", "frontend", "reference", "runtime"},
    "gate": {*BASE, "evaluate", "evaluate_text", "frontend", "runtime", "verify", "verify_compare"},
    "scoring": {*BASE, "runtime"},
    "lm_eval_adapter": {*BASE, "runtime", "scoring"},
    "roofline": {*BASE, "inspect", "kernel_work", "limits", "quant.schemes", "runtime.profile"},
    "bench": {*BASE, "kernel_work", "limits", "roofline", "runtime"},
    "debug_taps": {*BASE, *DRIVER, *COMPILER, "pipeline"},
    # the tuner: what a kernel class is comes from schedules, where it runs from the target
    "tune": {*BASE, "link", "passes.rewrite", "schedules", "targets"},
    "pipeline": {*BASE, *DRIVER, *COMPILER, "tune"},
    "cli": {
        *BASE,
        *DRIVER,
        "evaluate",
        "evaluate_text",
        "bench",
        "simulate",
        "limits",
        "roofline",
        "gate",
        "frontend.graph",
        "quant.choose",
        "pipeline",
        "runtime",
        "schedules.records",
        "targets",
        "tune",
    },
    "__main__": {"cli"},
    # the lazy attributes of the package
    "__init__": {"errors", "spec", "pipeline", "runtime"},
}
# third-party packages that the runtime must do without
NOT_IN_RUNTIME = {"torch", "transformers", "huggingface_hub", "onnx"}


@functools.cache
def sources() -> dict[str, Path]:
    """Dotted name below llmc (``passes.rewrite``) -> file, of every module that installs."""
    found = {}
    for path in sorted((ROOT / "llmc").rglob("*.py")):
        if not any(parent.is_symlink() for parent in path.parents):
            found[_dotted(path.relative_to(ROOT / "llmc"))] = path
    for top in MAPPED:
        for path in sorted((ROOT / top).rglob("*.py")):
            found[_dotted(path.relative_to(ROOT))] = path
    return found


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


TOP = {module.split(".")[0] for module in sources()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; ``from a import b`` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports (STYLE 17)"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rule_of(module: str) -> str:
    """The longest key of ALLOWED that covers a module."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in ALLOWED:
            return ".".join(parts[:n])
    raise AssertionError(
        f"llmc.{module} has no rule in tests/test_architecture.py: decide what it may import"
    )


@pytest.mark.parametrize("module", sources())
def test_imports_point_downward(module: str) -> None:
    path = sources()[module]
    rule = rule_of(module)
    allowed = ALLOWED[rule] | {rule}
    for name in imports(path):
        head, _, rest = name.partition(".")
        assert head not in MAPPED, f"{path}: import llmc.{name}"
        assert head not in ("tests", "tools"), f"{path} imports {name}"
        if rule == "runtime":
            assert head not in NOT_IN_RUNTIME, f"{path}: the runtime must work without {head}"
        # attributes of the package itself (llmc.__version__) are free
        if head == "llmc" and rest and rest.split(".")[0] in TOP:
            assert any(rest == a or rest.startswith(a + ".") for a in allowed), (
                f"{path} must not import {name}"
            )


def test_the_environment_is_read_in_knobs_only() -> None:
    for module, path in sources().items():
        if module == "knobs":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            assert name not in ("environ", "getenv", "putenv"), (
                f"{path}: read the environment in llmc/knobs.py"
            )


def test_files_stay_readable() -> None:
    # STYLE 16 asks for 100-400 lines; this is where a file certainly has become two things
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources().values()}
    assert {p: n for p, n in long.items() if n > 600} == {}


def test_every_package_is_listed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(config["tool"]["setuptools"]["packages"])
    found = {"llmc"}
    for base, folder in [("llmc", ROOT / "llmc"), *((f"llmc.{t}", ROOT / t) for t in MAPPED)]:
        for path in folder.rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                found.add(".".join((base, *path.parent.relative_to(folder).parts)))
    assert listed == found


def test_the_mapped_folders_are_linked() -> None:
    for top in MAPPED:
        link = ROOT / "llmc" / top
        assert link.is_symlink() and link.resolve() == ROOT / top


def test_the_wheel_ships_every_module(tmp_path: Path) -> None:
    # the build backend is called directly: no network, no isolated environment
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools>=77")
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    copy = tmp_path / "copy"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in files.stdout.decode().split("\0"):
        # symbolic links stay out as in an archive made without them: the package-dir mapping must do
        if name.endswith((".py", ".toml", ".typed", ".json", ".md")) or name == "LICENSE":
            source = ROOT / name
            if source.is_file() and not name.startswith(("examples/", "tests/")):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(source.read_bytes())
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {n for n in shipped if not n.startswith("llmc/")} == set()
    expected = {
        f"llmc/{path.relative_to(ROOT / 'llmc' if (ROOT / 'llmc') in path.parents else ROOT).as_posix()}"
        for path in sources().values()
    }
    assert {n for n in shipped if n.endswith(".py")} == expected
    assert "llmc/py.typed" in shipped


def test_import_llmc_is_light() -> None:
    code = (
        "import sys, llmc, llmc.cli.app, llmc.spec, llmc.artifact\n"
        "print([m for m in ('tvm', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    commands = [
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("python3 -m venv") and "pytest" in line
    ]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_version_is_the_distributions() -> None:
    import llmc

    assert importlib.metadata.version("llmc-compiler") == llmc.__version__
