import numpy as np
import pytest

from llmc.schedules.gather import EmbeddingConfig, GatherConfig, embedding, gather_rows
from llmc.schedules.layout import linear_layout


@pytest.mark.parametrize("k", [37, 64])
@pytest.mark.parametrize(("dtype", "packed"), [("bfloat16", True), ("float32", True), ("float16", False)])
def test_embedding(dtype, packed, k, best, tools):
    rng = np.random.default_rng(0)
    layout = linear_layout(dtype, best) if packed else None
    kernel = tools.build(best, k=embedding(EmbeddingConfig(100, k, dtype, "int32", 1, layout), best))["k"]
    table = tools.random(rng, (100, k), dtype)
    stored = tools.tensor(layout.pack(table) if layout else table)
    for tokens in (1, 9):
        ids = rng.integers(0, 100, (1, tokens)).astype(np.int32)
        ids[0, 0] = 99
        out = tools.tensor(np.zeros((1, tokens, k), tools.dtypes[dtype]))
        kernel(tools.tensor(ids), stored, out)
        assert (out.numpy() == table[ids]).all()


def test_gather_rows(best, tools):
    rng = np.random.default_rng(0)
    kernel = tools.build(best, k=gather_rows(GatherConfig(37, "bfloat16", 1), best))["k"]
    x = tools.random(rng, (1, 8, 37), "bfloat16")
    for rows in ([7], [7, 0, 3, 3, 2, 1]):
        out = tools.tensor(np.zeros((1, len(rows), 37), tools.dtypes["bfloat16"]))
        kernel(tools.tensor(x), tools.tensor(np.array(rows, np.int32)), out)
        assert (out.numpy() == x[:, rows]).all()
