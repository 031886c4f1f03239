"""What cache pages make of keys and values, in torch: for the source model that an artifact is compared with."""

from __future__ import annotations

import torch

from llmc.kv_plan import CODE_RANGE, SMALLEST_SCALE


def round_cache(x: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """Keys or values [..., d] as they are read back from pages of `kv_dtype`, in their own dtype.

    Pages of codes have a scale per token and head, that is for the last axis (schedules/kv_codes.py).
    """
    if kv_dtype not in CODE_RANGE:
        dtype: torch.dtype = getattr(torch, kv_dtype)
        return x.to(dtype).to(x.dtype)
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / CODE_RANGE[kv_dtype]).to(torch.bfloat16).float()
    usable = (scale >= SMALLEST_SCALE) & scale.isfinite()
    quotient = torch.where(usable, wide, 0.0) / torch.where(usable, scale, 1.0)
    codes = quotient.round() if kv_dtype == "int8" else quotient.to(torch.float8_e4m3fn).float()
    return (codes * torch.where(scale < SMALLEST_SCALE, 0.0, scale)).to(x.dtype)
