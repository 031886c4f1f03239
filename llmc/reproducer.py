"""What llmc leaves behind when a stage or pass fails with a bug: all that is needed to see it fail again."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc import knobs
from llmc.spec import CompileSpec

# distributions whose versions decide what a compile does
DISTRIBUTIONS = (
    "llmc-compiler",
    "apache-tvm",
    "apache-tvm-ffi",
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Installed versions of llmc and of what it stands on; imports nothing, so broken packages show too."""
    out = {"python": platform.python_version(), "platform": platform.platform()}
    for name in DISTRIBUTIONS:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "missing"
    return out


def toml_text(values: dict[str, Any]) -> str:
    """A flat table as TOML; keys with the value None are left out, because TOML has no null."""
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """One TOML value: strings, booleans, numbers, lists and tables of them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
    # JSON's string escapes are a subset of TOML's basic strings
    return json.dumps(str(value))


def write_reproducer(
    spec: CompileSpec,
    label: str,
    ran_before: Sequence[str],
    text: str | None,
    value: object,
    error: BaseException,
) -> Path:
    """Write the folder and return its path.

    Files: ``spec.toml`` (for ``llmc compile --spec``), ``command.txt``, ``traceback.txt``, ``versions.json``,
    ``before.py`` (the IR that went into the failing stage or pass) and, for a TVM module, ``before.json``
    (``tvm.ir.load_json``). Falls back to the system's temporary folder when the cache folder is not writable.
    """
    folder = _new_folder(label)
    (folder / "spec.toml").write_text(toml_text(spec.to_json()), encoding="utf-8")
    (folder / "command.txt").write_text(shlex.join([sys.executable, *sys.argv]) + "\n", encoding="utf-8")
    (folder / "traceback.txt").write_text(
        f"failed: {label}\nran before: {', '.join(ran_before) or 'nothing'}\n\n"
        + "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        encoding="utf-8",
    )
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n", encoding="utf-8")
    if text is not None:
        (folder / "before.py").write_text(text, encoding="utf-8")
    # llmc's own stage results carry the TVM module in a field
    module = getattr(value, "module", value)
    if hasattr(module, "script"):
        try:
            import tvm

            (folder / "before.json").write_text(tvm.ir.save_json(module), encoding="utf-8")
        except Exception:
            # the text is there already; a second failure must not hide the first
            (folder / "before.json").unlink(missing_ok=True)
    return folder


def _new_folder(label: str) -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{label.replace('/', '-')}-"
    parent = knobs.cache_dir() / "reproducers"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=name, dir=parent))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"llmc-{name}"))
