"""Relax VM code generation, shared by all targets that TVM builds for."""

from __future__ import annotations

from typing import Any

from tvm import relax


def build_executable(module: Any, target: Any) -> Any:
    """A module in VM form (after passes.order.build_phase) to a VM executable for `target`.

    The kernels are scheduled already, so only TVM's TIR lowering and code generation run.
    """
    return relax.build(module, target, relax_pipeline=None, tir_pipeline="default", exec_mode="bytecode")
