import numpy as np
import pytest

from llmc.schedules.experts import ExpertConfig, expert_linear
from llmc.schedules.layout import linear_layout


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "bias", "ids_dtype"),
    [("bfloat16", "bfloat16", True, "int32"), ("float32", "float32", False, "int64")],
)
def test_expert_linear_matches_numpy(dtype, out_dtype, bias, ids_dtype, caps, tools):
    experts, n, k = 5, 70, 34
    cfg = ExpertConfig(experts, n, k, dtype, dtype, out_dtype, ids_dtype, bias)
    kernel = tools.build(caps, k=expert_linear(cfg, caps))["k"]
    rng = np.random.default_rng(0)
    weight, b = tools.random(rng, (experts, n, k), dtype), tools.random(rng, (experts, n), dtype)
    packed = tools.tensor(linear_layout(dtype, caps).pack(weight))
    for rows in (1, 2, 31, 100):
        x = tools.random(rng, (rows, k), dtype)
        ids = rng.integers(0, experts - 1, rows).astype(ids_dtype)  # the last expert stays without rows
        y = tools.tensor(np.full((rows, n), np.nan, tools.dtypes[out_dtype]))
        kernel(tools.tensor(x), tools.tensor(ids), packed, *([tools.tensor(b)] if bias else []), y)
        expected = np.einsum("rnk,rk->rn", weight[ids].astype(np.float64), x.astype(np.float64))
        expected += b[ids].astype(np.float64) if bias else 0
        error = np.abs(y.numpy().astype(np.float64) - expected).max() / np.abs(expected).max()
        assert error < tools.exact[out_dtype] / 2
