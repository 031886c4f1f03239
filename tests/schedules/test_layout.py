import ml_dtypes
import numpy as np
import pytest

from llmc.schedules.layout import BlockedLayout, linear_layout
from llmc.targets.cpu.backend import capabilities


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint16])
@pytest.mark.parametrize("shape", [(64, 32), (70, 33), (1, 1), (3, 70, 33)])
@pytest.mark.parametrize("layout", [BlockedLayout(64, 2), BlockedLayout(16, 1)])
def test_pack_round_trip_and_padding(dtype, shape, layout):
    weight = np.arange(1, np.prod(shape) + 1).reshape(shape).astype(dtype)
    packed = layout.pack(weight)
    assert packed.shape == (*shape[:-2], *layout.packed_shape(*shape[-2:]))
    assert packed.dtype == weight.dtype and packed.flags.c_contiguous
    assert (layout.unpack(packed, *shape[-2:]) == weight).all()
    assert (packed != 0).sum() == (weight != 0).sum()


def test_element_position():
    weight = np.arange(8 * 6).reshape(8, 6)
    packed = BlockedLayout(4, 2).pack(weight)
    for row in range(8):
        for column in range(6):
            assert packed[row // 4, column // 2, row % 4, column % 2] == weight[row, column]


def test_text_round_trip():
    layout = BlockedLayout(32, 2)
    assert layout.as_text() == "blocked(n=32,k=2)"
    assert BlockedLayout.parse(layout.as_text()) == layout
    with pytest.raises(ValueError, match="rows"):
        BlockedLayout.parse("rows")


def test_layout_follows_the_registers():
    assert linear_layout("bfloat16", capabilities("x86-64-v4-bf16")) == BlockedLayout(64, 2)
    assert linear_layout("float32", capabilities("x86-64-v3")) == BlockedLayout(16, 1)
    assert linear_layout("float16", capabilities("aarch64")) == BlockedLayout(16, 1)
