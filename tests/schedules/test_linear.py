import json

import numpy as np
import pytest

from llmc.schedules.choice import ByRows
from llmc.schedules.layout import linear_layout
from llmc.schedules.linear import LinearConfig, LinearSchedule, linear

# (n, k, dtype, out, bias, lead, k_block): sizes that leave tails everywhere, odd k, several k chunks, exact blocks;
# with k = 300 a block has several pieces for few rows, and one for many
CASES = [
    (130, 67, "bfloat16", "bfloat16", True, 1, 2048),
    (192, 256, "bfloat16", "float32", False, 0, 96),
    (70, 100, "float16", "float16", True, 2, 48),
    (64, 67, "bfloat16", "float32", True, 0, 16),
    (64, 33, "float32", "float32", True, 1, 16),
    (5, 8, "float32", "float32", False, 1, 2048),
    (70, 300, "bfloat16", "bfloat16", True, 1, 2048),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_linear_matches_numpy(case, caps, tools):
    n, k, dtype, out_dtype, has_bias, lead, k_block = case
    schedule = ByRows((LinearSchedule(k_block=k_block, t_block=12),))
    cfg = LinearConfig(n, k, dtype, dtype, out_dtype, has_bias, lead, schedule=schedule)
    kernel = tools.build(caps, k=linear(cfg, caps))["k"]
    rng = np.random.default_rng(0)
    layout = linear_layout(dtype, caps)
    weight, bias = tools.random(rng, (n, k), dtype), tools.random(rng, (n,), dtype)
    packed = tools.tensor(layout.pack(weight))
    for rows in (1, 2, 3, 5, 7, 12, 13, 16, 17, 29):
        x = tools.random(rng, (*[1] * lead, rows, k), dtype)
        y = tools.tensor(np.full((*[1] * lead, rows, n), np.nan, tools.dtypes[out_dtype]))
        extra = [tools.tensor(bias)] if has_bias else []
        kernel(tools.tensor(x), packed, *extra, y)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T + (
            bias.astype(np.float64) if has_bias else 0
        )
        error = np.abs(y.numpy().astype(np.float64) - expected).max() / np.abs(expected).max()
        assert error < tools.exact[out_dtype] / 2, rows


def test_nan_reaches_the_result(best, tools):
    cfg = LinearConfig(20, 16, "bfloat16", "bfloat16", "bfloat16")
    kernel = tools.build(best, k=linear(cfg, best))["k"]
    weight = np.ones((20, 16), tools.dtypes["bfloat16"])
    weight[3, 5] = np.nan
    y = tools.tensor(np.zeros((1, 20), tools.dtypes["bfloat16"]))
    kernel(
        tools.tensor(np.ones((1, 16), tools.dtypes["bfloat16"])),
        tools.tensor(linear_layout("bfloat16", best).pack(weight)),
        y,
    )
    assert np.isnan(y.numpy().astype(np.float32)[0]).nonzero()[0].tolist() == [3]


def test_rounding_to_nearest_even(best, tools):
    """A bf16 result is rounded, not truncated: 1 + 3 * 2**-8 lies between two neighbours, and goes to the even one."""
    cfg = LinearConfig(1, 2, "bfloat16", "bfloat16", "bfloat16")
    kernel = tools.build(best, k=linear(cfg, best))["k"]
    x = np.array([[1, 1]], tools.dtypes["bfloat16"])
    for low in (1, 3, 5):
        weight = np.array([[1, low * 2**-8]], tools.dtypes["bfloat16"])
        y = tools.tensor(np.zeros((1, 1), tools.dtypes["bfloat16"]))
        kernel(tools.tensor(x), tools.tensor(linear_layout("bfloat16", best).pack(weight)), y)
        assert y.numpy()[0, 0] == np.float32(1 + low * 2**-8).astype(tools.dtypes["bfloat16"])


def test_config_json_round_trip(best):
    cfg = LinearConfig(8, 8, "float32", "float32", "float32", layout=linear_layout("float32", best))
    assert LinearConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg


def test_mixed_dtypes_are_refused(best):
    with pytest.raises(ValueError, match="same"):
        linear(LinearConfig(8, 8, "float32", "bfloat16", "float32"), best)
