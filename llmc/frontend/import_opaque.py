"""Converters of the operators that stay opaque: attention and its mask, expert layers."""

from __future__ import annotations

from typing import Any

from tvm import relax

from llmc.frontend.import_base import (
    Args,
    Converter,
    dtype_of,
    module_path,
    permute,
    reshape,
    same_shape,
)
from llmc.ir import opaque_call, tensor_type
from llmc.ops import EXPERT_LINEAR, ExpertLinearAttrs
from llmc.passes.raise_attention import MASK, MASKED_ATTENTION, MaskAttrs, MaskedAttentionAttrs

op = relax.op


def _mask(im: Any, a: Args, out: Any) -> Any:
    attrs = MaskAttrs(causal=a["causal"], window=a["window"], chunk=a["chunk"])
    return im.emit(
        opaque_call(
            MASK,
            [a["padding"]] if a["padding"] is not None else [],
            attrs.to_json(),
            tensor_type(im.shape(out), im.dtype(out.dtype)),
        )
    )


def _attention(im: Any, a: Args, out: Any) -> Any:
    attrs = MaskedAttentionAttrs(
        scale=a["scale"],
        softcap=a["softcap"],
        causal=a["causal"],
        window=a["window"],
        has_mask=a["mask"] is not None,
        has_sinks=a["sinks"] is not None,
        path=module_path(im.node, im.prefix),
    )
    operands = [a[n] for n in ("q", "k", "v", "mask", "sinks") if a[n] is not None]
    out_type = tensor_type(im.shape(out), im.dtype(out.dtype))
    return im.emit(opaque_call(MASKED_ATTENTION, operands, attrs.to_json(), out_type))


def _sdpa(im: Any, a: Args, out: Any) -> Any:
    """scaled_dot_product_attention of [b,h,s,d] (or [h,s,d]); a boolean mask becomes an additive one."""
    q, k, v = a["query"], a["key"], a["value"]
    if len(q.ty.shape) == 3:
        q, k, v = (reshape(im, x, [1, *x.ty.shape]) for x in (q, k, v))
    mask = a.get("attn_mask")
    if mask is not None and dtype_of(mask) == "bool":
        zero, low = im.constant(0.0, "float32"), im.constant(float("-inf"), "float32")
        mask = im.emit(op.where(mask, zero, low))
    scale = a.get("scale")
    attrs = MaskedAttentionAttrs(
        scale=float(int(q.ty.shape[-1]) ** -0.5 if scale is None else scale),
        causal=bool(a.get("is_causal", False)),
        has_mask=mask is not None,
        path=module_path(im.node, im.prefix),
    )
    b, h, s, dv = q.ty.shape[0], q.ty.shape[1], q.ty.shape[2], v.ty.shape[3]
    out_type = tensor_type([b, s, h, dv], im.dtype(out.dtype))
    operands = [q, k, v] if mask is None else [q, k, v, mask]
    y = im.emit(opaque_call(MASKED_ATTENTION, operands, attrs.to_json(), out_type))
    y = permute(im, y, [0, 2, 1, 3])
    return y if same_shape(y.ty.shape, im.shape(out)) else reshape(im, y, im.shape(out))


def _expert_linear(im: Any, a: Args, out: Any) -> Any:
    attrs = ExpertLinearAttrs(has_bias=a["bias"] is not None, transposed=a["transposed"])
    operands = [a["x"], a["expert_ids"], a["weight"]] + ([a["bias"]] if a["bias"] is not None else [])
    out_type = tensor_type(im.shape(out), im.dtype(out.dtype))
    return im.emit(opaque_call(EXPERT_LINEAR, operands, attrs.to_json(), out_type))


CONVERTERS: dict[str, Converter] = {
    "llmc.mask.default": _mask,
    "llmc.attention.default": _attention,
    "llmc.expert_linear.default": _expert_linear,
    "scaled_dot_product_attention.default": _sdpa,
}
