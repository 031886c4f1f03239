"""Code generation shared by all targets that TVM builds for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx

from llmc.caps import Capabilities
from llmc.link import export_objects, link_objects
from llmc.schedules.emit import LOWERED

# Passes of TVM's own lowering that look for work at every statement of a kernel and find none in those that
# schedules.emit.kernel makes: buffers have the sizes that they need, loops and conditions are where they belong, and
# LLVM finds common subexpressions. They took most of the time of a compile.
_NOT_FOR_LOWERED = (
    "s_tir.CompactBufferAllocation",
    "s_tir.HoistIfThenElse",
    "s_tir.RenormalizeSplitPattern",
    "tirx.CommonSubexprElim",
)
_PIPELINE = "llmc"


def build_executable(module: Any, target: Any) -> Any:
    """A module in VM form (after passes.order.build_phase) to a VM executable for `target`.

    The kernels are scheduled already, so only TVM's TIR lowering and code generation run.
    """
    return relax.build(module, target, relax_pipeline=None, tir_pipeline=tir_pipeline(), exec_mode="bytecode")


def build_kernel(func: Any, target: Any, caps: Capabilities, path: Path) -> None:
    """One PrimFunc as the function ``k`` of a shared library, for measuring.

    Raises:
        LlmcError: there is no C++ driver that links for the machine of `caps`, or it failed.
    """
    module = tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
    built = tirx.build(module, target, pipeline=tir_pipeline())
    with tempfile.TemporaryDirectory(prefix="llmc-link-") as work:
        link_objects(export_objects(built, Path(work)), path, triple=caps.triple)


def tir_pipeline() -> str:
    """The name of TVM's own lowering of TIR, without what functions that are lowered already do not need."""

    def factory() -> Any:
        whole, finalize_host, finalize_device = tirx.get_tir_pipeline("default")

        @tvm.transform.module_pass(opt_level=0, name="LowerKernels")
        def lower(module: Any, context: Any) -> Any:
            lowered = {
                var: f for var, f in module.functions.items() if f.attrs is not None and LOWERED in f.attrs
            }
            others = {var: f for var, f in module.functions.items() if var not in lowered}
            disabled = [str(name) for name in context.disabled_pass]
            out = tvm.IRModule({}, attrs=module.attrs)
            if others:
                out.update(whole(tvm.IRModule(others, attrs=module.attrs)))
            if lowered:
                with tvm.transform.PassContext(
                    opt_level=context.opt_level,
                    required_pass=list(context.required_pass),
                    disabled_pass=[*disabled, *_NOT_FOR_LOWERED],
                    config=dict(context.config),
                ):
                    out.update(whole(tvm.IRModule(lowered, attrs=module.attrs)))
            return out

        return lower, finalize_host, finalize_device

    tirx.register_tir_pipeline(_PIPELINE, factory)
    return _PIPELINE
