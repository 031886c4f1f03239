"""Schedules by number of rows: the table, and the kernel that dispatches on it."""

from dataclasses import replace

import numpy as np
import pytest

from llmc.quant.schemes import by_name
from llmc.schedules import emit as e
from llmc.schedules import tune_qlinear
from llmc.schedules.attention import attention_decode, attention_prefill
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule, PrefillSchedule
from llmc.schedules.choice import ByRows
from llmc.schedules.linear import LinearConfig, LinearSchedule, linear
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tune_qlinear import (
    QuantKernel,
    QuantLinearSchedule,
    quant_linear_by_rows,
)

CHOICES = (
    LinearSchedule(prefetch=0, unroll=2),
    LinearSchedule(rows_tile=2, k_block=64),
    LinearSchedule(rows_tile=3, t_block=9, block_fast=True),
)


def test_the_limits_decide():
    table = ByRows((1, 2, 3), (1, 16))
    assert [table.at(rows) for rows in (1, 2, 16, 17, 9999)] == [1, 2, 2, 3, 3]
    assert ByRows.of([(1, "a"), (4, "b"), (8, "b"), (0, "b")]) == ByRows(("a", "b"), (1,))
    assert ByRows.of([(1, "a"), (0, "a")]) == ByRows(("a",))


def test_json_round_trip():
    table = ByRows(CHOICES, (1, 8))
    assert ByRows.from_json(LinearSchedule, table.to_json()) == table
    config = LinearConfig(8, 8, "float32", "float32", "float32", schedule=table)
    assert LinearConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("limits", [(1, 2, 3), (4, 2), (0, 2)])
def test_limits_that_make_no_sense(limits):
    with pytest.raises(ValueError, match="limits"):
        ByRows((1, 2, 3)[: 2 if len(limits) == 3 else 3], limits)


def test_schedules_of_one_weight_agree_in_its_layout():
    with pytest.raises(ValueError, match="packed once"):
        LinearConfig(
            8,
            8,
            "float32",
            "float32",
            "float32",
            schedule=ByRows((LinearSchedule(), LinearSchedule(vectors=2)), (1,)),
        )
    with pytest.raises(ValueError, match="scratch"):
        AttentionConfig(
            2, 2, 8, 8, "float32", "float32", 16, 1, 1.0,
            decode=ByRows((DecodeSchedule(), DecodeSchedule(splits=2)), (1,)),
        )  # fmt: skip


def test_dispatch_computes_what_each_schedule_does_alone(best, tools):
    config = LinearConfig(70, 130, "float32", "float32", "float32", has_bias=True)
    built = {f"k{i}": linear(replace(config, schedule=ByRows((c,))), best) for i, c in enumerate(CHOICES)}
    built["all"] = linear(replace(config, schedule=ByRows(CHOICES, (1, 8))), best)
    library = tools.build(best, **built)
    rng = np.random.default_rng(0)
    weight, bias = tools.random(rng, (70, 130), "float32"), tools.random(rng, (70,), "float32")
    packed = tools.tensor(config.weight_layout(best).pack(weight))
    for rows, alone in ((1, 0), (2, 1), (8, 1), (9, 2), (31, 2)):
        x = tools.random(rng, (rows, 130), "float32")
        results = []
        for name in ("all", f"k{alone}"):
            y = tools.tensor(np.full((rows, 70), np.nan, np.float32))
            library[name](tools.tensor(x), packed, tools.tensor(bias), y)
            results.append(y.numpy())
        assert np.array_equal(*results), rows
        np.testing.assert_allclose(results[0], x @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_kernel_for_few_rows_refuses_more(best, tools):
    config = LinearConfig(16, 8, "float32", "float32", "float32", schedule=ByRows((LinearSchedule(),), (4,)))
    kernel = tools.build(best, k=linear(config, best))["k"]
    packed = tools.tensor(config.weight_layout(best).pack(np.ones((16, 8), np.float32)))

    def call(rows):
        y = tools.tensor(np.zeros((rows, 16), np.float32))
        kernel(tools.tensor(np.ones((rows, 8), np.float32)), packed, y)
        return y.numpy()

    assert (call(4) == 8).all()
    with pytest.raises(Exception, match="fewer rows"):
        call(5)


def test_attention_kernels_dispatch_too(best):
    config = AttentionConfig(
        2, 2, 16, 16, "float32", "float32", 16, 1, 0.25,
        prefill=ByRows((PrefillSchedule(), PrefillSchedule(tile_rows=16)), (64,)),
        decode=ByRows((DecodeSchedule(), DecodeSchedule(keys=64)), (4,)),
    )  # fmt: skip
    assert AttentionConfig.from_json(config.to_json()) == config
    for build in (attention_prefill, attention_decode):
        text = build(config, best).script()
        assert text.count("T.parallel(") == 2


def test_kernels_are_merged_into_one_that_chooses(best, tools):
    """For kernels that do not dispatch by themselves."""
    config = LinearConfig(40, 30, "float32", "float32", "float32", has_bias=True)
    builders = [lambda c=c: linear(replace(config, schedule=ByRows((c,))), best) for c in CHOICES]
    library = tools.build(
        best, all=e.merged("T", (1, 8), builders), **{f"k{i}": build() for i, build in enumerate(builders)}
    )
    rng = np.random.default_rng(0)
    weight, bias = tools.random(rng, (40, 30), "float32"), tools.random(rng, (40,), "float32")
    packed = tools.tensor(config.weight_layout(best).pack(weight))
    for rows, alone in ((1, 0), (8, 1), (30, 2)):
        x = tools.random(rng, (rows, 30), "float32")
        results = []
        for name in ("all", f"k{alone}"):
            y = tools.tensor(np.full((rows, 40), np.nan, np.float32))
            library[name](tools.tensor(x), packed, tools.tensor(bias), y)
            results.append(y.numpy())
        assert np.array_equal(*results), rows
        np.testing.assert_allclose(results[0], x @ weight.T + bias, rtol=1e-4, atol=1e-4)
    # the words of the builder are as they were
    assert builders[0]().script().count("sblock") == 1


def test_quantized_kernels_by_rows(best, tools, monkeypatch):
    """Each range of rows runs the kernel of its own schedule; a stand-in, because the real one takes long to build."""

    def stand_in(config, caps):
        built = []
        with e.kernel(built):
            t = e.dim("T")
            x, y = e.tensor("x", [t, 1], "float32"), e.tensor("y", [t, 1], "float32")
            with e.root():
                xf, yf = e.flat(x, t), e.flat(y, t)
                with e.loop(t) as i:
                    e.store(yf, i, xf[i] * e.f32(config.prefetch) + e.f32(config.t_block), 1)
        return built[0]

    monkeypatch.setattr(tune_qlinear, "quant_linear", stand_in)
    config = QuantLinearConfig(1, quant_layout(by_name("q8"), 16, 32, best), "float32", "float32")
    table = ByRows(
        (QuantLinearSchedule(24, 1), QuantLinearSchedule(48, 2), QuantLinearSchedule(8, 3)), (1, 8)
    )
    kernel = QuantKernel(config, table)
    assert kernel.to_json()["schedule"]["limits"] == [1, 8]
    built = tools.build(best, k=quant_linear_by_rows(kernel, best))["k"]
    for rows, expected in ((1, 10 + 24), (2, 20 + 48), (8, 20 + 48), (9, 30 + 8)):
        y = tools.tensor(np.zeros((rows, 1), np.float32))
        built(tools.tensor(np.full((rows, 1), 10, np.float32)), y)
        assert (y.numpy() == expected).all(), rows
