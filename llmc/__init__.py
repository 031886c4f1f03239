"""llmc: an ahead-of-time compiler for large language models, and the thin runtime of what it compiles.

In short:

    import llmc
    llmc.compile("examples/models/stdlib-llama", target="cpu", output="dist/demo")
    model = llmc.load("dist/demo")
    print(model.generate("import os", max_tokens=32, temperature=0).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmc.errors import LlmcError as LlmcError
    from llmc.pipeline import compile_model as compile
    from llmc.runtime.model import Model as Model
    from llmc.runtime.model import load as load
    from llmc.spec import CompileSpec as CompileSpec

# name -> (module, attribute); imported on first use so that `import llmc` needs neither tvm nor torch
_LAZY = {
    "LlmcError": ("llmc.errors", "LlmcError"),
    "CompileSpec": ("llmc.spec", "CompileSpec"),
    "compile": ("llmc.pipeline", "compile_model"),
    "load": ("llmc.runtime.model", "load"),
    "Model": ("llmc.runtime.model", "Model"),
}
__all__ = ["CompileSpec", "LlmcError", "Model", "compile", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'llmc' has no attribute {name!r}")
