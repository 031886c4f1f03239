"""Norm kernels against torch: kinds, additions, a norm of the addend, dtypes and odd widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmc.ops import NormAttrs
from llmc.schedules.norm import NormConfig, norm

RMS = NormAttrs(1e-5, has_weight=True)
GEMMA = NormAttrs(1e-6, plus_one=True, has_weight=True)
LAYER = NormAttrs(1e-5, center=True, has_weight=True, has_bias=True)
PLAIN = NormAttrs(1e-5)
CASES = {
    "rms": RMS,
    "gemma": GEMMA,
    "layer": LAYER,
    "plain": PLAIN,
    "add": replace(LAYER, adds=True),
    "norm_add_norm": replace(RMS, adds=True, before=GEMMA),
    "layer_add_rms": replace(RMS, adds=True, before=LAYER),
    "norm_add": NormAttrs(0.0, adds=True, only_sum=True, before=LAYER),
}


def reference(x: torch.Tensor, attrs: NormAttrs, vectors: list[torch.Tensor]) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True) if attrs.center else x
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + attrs.eps)
    rest = list(vectors)
    if attrs.has_weight:
        y = y * (rest.pop(0) + attrs.plus_one)
    return y + rest.pop(0) if attrs.has_bias else y


@pytest.mark.parametrize("width", [64, 50])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_norm(tools, best, case, dtype, width):
    attrs, kind = CASES[case], getattr(torch, dtype)
    config = NormConfig((1, -1, width), dtype, dtype, attrs)
    assert NormConfig.from_json(config.to_json()) == config
    kernel = tools.build(best, norm=norm(config, best))["norm"]
    torch.manual_seed(0)
    for rows in (1, 7):
        x, addend = (torch.randn(1, rows, width).to(kind) for _ in range(2))
        vectors = [torch.randn(width).to(kind) for _ in range(config.vectors)]
        tensors = [x, *([addend] if attrs.adds else []), *vectors]
        args = [tools.tensor(t.float().numpy().astype(tools.dtypes[dtype])) for t in tensors]
        results = 2 if attrs.adds and not attrs.only_sum else 1
        out = [tools.tensor(np.full((1, rows, width), np.nan, tools.dtypes[dtype])) for _ in range(results)]
        kernel(*args, *out)
        wide, floats = x.float(), [v.float() for v in vectors]
        expected = []
        if attrs.adds:
            value = addend.float()
            if attrs.before is not None:
                count = attrs.before.vectors
                value, floats = reference(value, attrs.before, floats[:count]), floats[count:]
            wide = (wide + value).to(kind).float()
            expected.append(wide)
        if not attrs.only_sum:
            expected.append(reference(wide, attrs, floats))
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        for got, want in zip(out, expected, strict=True):
            found = got.numpy().astype(np.float32)
            np.testing.assert_allclose(found, want.numpy(), rtol=tolerance, atol=tolerance)
