"""The launch that rounds the rows of x, for schemes that want that."""

from __future__ import annotations

from llmc.caps import Capabilities
from llmc.quant.schemes import Code
from llmc.schedules.gpu import qfloat, qint
from llmc.schedules.gpu.qoperands import Operands


def round_inputs(ops: Operands, caps: Capabilities) -> None:
    """Set ops.rounded, ops.rounded_to and ops.row_scales, if the scheme of the weight rounds activations."""
    kind = ops.cfg.layout.of.activations
    if kind is Code.INT:
        qint.quantize_rows(ops)
    elif kind is Code.E4M3:
        qfloat.quantize_rows(ops, caps)
