"""What a compile says about rounded activations: which units multiply them, and when a checkpoint's are left unrounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import SCHEMES, Code, by_name

if TYPE_CHECKING:
    from llmc.frontend.graph import WeightSource
    from llmc.passes.step_module import PackedParam


def fp8_note(params: Sequence[PackedParam], caps: Capabilities) -> str | None:
    """How this machine multiplies e4m3 with e4m3; None if no weight wants that."""
    if not any(p.scheme and by_name(p.scheme).activations is Code.E4M3 for p in params):
        return None
    return f"fp8 activations on {caps.preset}: {_products(caps)}"


def _products(caps: Capabilities) -> str:
    if not caps.simt:
        return "rounded e4m3 numbers are multiplied as bfloat16 or float32, which hold them exactly; there are no fp8 units"
    if caps.has_wgmma:
        return "more than 64 rows on fp8 matrix units (wgmma); fewer as float16, which holds the products exactly"
    if caps.fp8_mma is Fp8Mma.UNITS:
        return "on fp8 matrix units"
    if caps.fp8_mma is Fp8Mma.EXPANDED:
        return "multiplied as float16, which holds the products exactly; its fp8 matrix units are not used (sm_90a: they are)"
    if caps.has_mma_bf16:
        return (
            "no fp8 matrix units; rounded e4m3 numbers are multiplied as bfloat16, which holds them exactly"
        )
    return "no fp8 matrix units; rounded e4m3 numbers are multiplied in float32, slowly"


def unrounded_note(weights: WeightSource | None, params: Sequence[PackedParam]) -> str | None:
    """That activations stay as they are though the checkpoint was made for rounded ones; None if that is not so."""
    scheme_of = getattr(weights, "scheme_of", None)
    if scheme_of is None:
        return None
    found = {}
    for param in params:
        if not param.scheme or by_name(param.scheme).activation_bits:
            continue
        for source in param.sources:
            made_for = scheme_of(source)
            if made_for is not None and made_for.activation_bits:
                found[source] = made_for
    if not found:
        return None
    first = next(iter(found.values()))
    fp8 = first.activations is Code.E4M3
    asked = "fp8a8" if fp8 else first.name if first.name in SCHEMES else ""
    return (
        f"{len(found)} weights were made for {'fp8' if fp8 else 'int8'} activations; the artifact leaves activations unrounded, "
        f"which is more exact{f' (--quant {asked} rounds them)' if asked else ''}"
    )
