"""Kernels on tile registers: by emulated operations against numpy on any machine, and the code that is made for real ones."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from llmc.caps import TileUnit
from llmc.quant.schemes import by_name
from llmc.quant.weight import QuantizedWeight
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, Segment, segments
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.layout import linear_layout
from llmc.schedules.limits import TILE_KINDS, UNROLL, multiply_kernel, multiply_kinds
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tile_linear import linear_by_rows, tile_linear
from llmc.schedules.tiles import TileDot, Tiles
from llmc.schedules.tune_data import quantized_of
from llmc.schedules.tune_experts import ExpertKernel, ExpertSchedule, expert_linear_by_rows
from llmc.schedules.tune_linear import TunableLinear, finish
from llmc.schedules.tune_qlinear import TunableQuantLinear, quant_linear_by_rows
from llmc.targets.cpu.backend import capabilities
from tests.schedules.test_ilinear import check, rounded, weight_of

ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 70)
BF16 = "bfloat16"


def one_dot(caps, kind, inner):
    """a[16 x inner bytes] and b[inner / 4 x 64 bytes] as int32 -> c[16, 16] of 32 bits: c += a x b."""
    built = []
    with e.kernel(built):
        a = e.tensor("a", (16, 16), "int32")
        b = e.tensor("b", (16, 32), "int32")
        c = e.tensor("c", (16, 16), "int32")
        with e.root():
            tiles = Tiles(caps, (3,), (5,), inner)
            af, bf, cf = e.flat(a, 256), e.flat(b, 512), e.flat(c, 256)
            with tiles.launch(1, "") as _:
                tiles.load(0, cf, 0, 64)
                tiles.load(3, af, 0, 64)
                tiles.load(5, bf, 16, 128)  # every other row of lanes
                tiles.dot(kind, 0, 3, 5)
                tiles.store(0, cf, 0)
    return built[0]


def test_emulated_operations_are_the_documented_ones(emulated, tools):
    cases = [(kind, inner) for kind in TileDot for inner in (64, 32)]
    library = tools.build(emulated, **{f"{k.name}{i}": one_dot(emulated, k, i) for k, i in cases})
    rng = np.random.default_rng(0)
    for kind, inner in cases:
        if kind is TileDot.BF16:
            a = tools.random(rng, (16, 32), BF16)
            b = tools.random(rng, (16, 32, 2), BF16)
            c = tools.random(rng, (16, 16), "float32")
        else:
            a = rng.integers(-128, 128, (16, 64)).astype(np.int8)
            b = rng.integers(0, 256, (16, 32, 4)).astype(np.uint8)
            b = b.view(np.int8) if kind is TileDot.SIGNED else b
            c = rng.integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
        steps = inner // 4
        out = tools.tensor(c.view(np.int32).copy())
        library[f"{kind.name}{inner}"](
            tools.tensor(a.view(np.int32)), tools.tensor(b.view(np.int32)[..., 0]), out
        )
        left = a.reshape(16, 16, -1)[:, :steps].astype(np.float64)
        right = b[:steps, 16:].astype(np.float64)
        exact = c.astype(np.float64) + np.einsum("mkp,knp->mn", left, right)
        if kind is TileDot.BF16:
            np.testing.assert_allclose(out.numpy().view(np.float32), exact, atol=2e-5)
        else:  # modulo 2**32
            np.testing.assert_array_equal(out.numpy(), exact.astype(np.int64).astype(np.int32))


_FAULTS = """
import sys; from dataclasses import replace; import numpy as np, tvm
from tvm.tirx.script import builder as T
from llmc.caps import TileUnit
from llmc.quant.weight import QuantizedWeight
from llmc.schedules import emit as e
from llmc.schedules.tiles import TileDot, Tiles
from llmc.targets.cpu.backend import capabilities, tvm_target
caps = replace(capabilities(""), tiles=TileUnit.EMULATED)
built = []
with e.kernel(built):
    c = e.tensor("c", (256,), "int32")
    with e.root():
        tiles = Tiles(caps, (3,), (5,), 32)
        with tiles.launch(1, "") as _:
            {}
            tiles.store(0, c, 0)
        {}
f = tvm.compile(tvm.IRModule({{"k": built[0].with_attr("global_symbol", "k")}}), target=tvm_target(caps))["k"]
f(tvm.runtime.tensor(np.zeros(256, np.int32)))
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "faults"),
    [
        ("tiles.dot(TileDot.SIGNED, 0, 3, 5)", False),
        ("tiles.dot(TileDot.SIGNED, 0, 3, 6)", True),  # 32 bytes of the left operand, 64 of the right one
        ("tiles.dot(TileDot.SIGNED, 0, 0, 5)", True),
        ("tiles._emit('tilerelease'); tiles.zero(1)", True),  # without a configuration
    ],
)
def test_emulation_faults_where_the_processor_does(operation, faults):
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS.format(operation, "pass")], capture_output=True, text=True
    )
    assert ("done" in done.stdout) != faults, done.stderr
    assert (done.returncode < 0) == faults


def expected_linear(cfg, case):
    sums = case["x"].astype(np.float64) @ case["weight"].astype(np.float64).T
    return finish(cfg, sums, case)


# tails of outputs and columns, several passes, less than a step, a single block with an epilogue of every kind
LINEAR = [
    (LinearConfig(130, 195, BF16, BF16, "float32", True, 1), LinearSchedule(tile_columns=64, tile_rows=32, tile_blocks=2)),
    (
        LinearConfig(
            96, 256, BF16, BF16, BF16,
            activation="silu", gated=True, gate_second=True, has_bias=True, has_residual=True,
        ),
        LinearSchedule(tile_columns=96, tile_rows=64, tile_wide=True, tile_unroll=1),
    ),
]  # fmt: skip
MORE_LINEAR = [
    (LinearConfig(64, 20, BF16, BF16, BF16), LinearSchedule(tile_wide=True, tile_prefetch=False)),
    (LinearConfig(40, 67, BF16, BF16, "float32"), LinearSchedule(vectors=3, tile_unroll=4)),
    (LinearConfig(100, 1000, BF16, BF16, "float32"), LinearSchedule(vectors=6, tile_rows=96)),
    (
        LinearConfig(256, 512, BF16, BF16, BF16, has_residual=True),
        LinearSchedule(vectors=8, tile_columns=512),
    ),
    (LinearConfig(16, 96, BF16, BF16, "float32"), LinearSchedule(vectors=1)),
]


@pytest.mark.parametrize(
    "cases", [LINEAR, pytest.param(MORE_LINEAR, marks=pytest.mark.slow)], ids=["usual", "more"]
)
def test_linear(cases, emulated, tools):
    tunable = TunableLinear()
    configs = [replace(cfg, schedule=ByRows((schedule,))) for cfg, schedule in cases]
    library = tools.build(emulated, **{f"k{i}": tile_linear(cfg, emulated) for i, cfg in enumerate(configs)})
    rng = np.random.default_rng(1)
    for i, cfg in enumerate(configs):
        for rows in (*ROWS, 130):
            case = tunable.case(cfg, rows, rng)
            arguments = tunable.arguments(cfg, cfg.schedule.choices[0], case, emulated)
            lead = lambda a, cfg=cfg: a.reshape(*[1] * cfg.lead, *a.shape)  # noqa: E731
            values = [
                tools.tensor(lead(v) if v.shape[0] == rows and v.ndim == 2 else v) for v in arguments.values
            ]
            library[f"k{i}"](*values)
            found = values[arguments.out].numpy().reshape(rows, cfg.n).astype(np.float64)
            expected = expected_linear(cfg, case)
            bound = tools.exact[cfg.out_dtype] * np.abs(expected).max()
            assert np.abs(found - expected).max() < bound, (cfg, rows)


def test_padding_of_columns_never_meets_nan(emulated, tools):
    """Columns past k are zeros on both sides: what lies behind a row or a block, here NaN, has no part in the sums."""
    cfg = LinearConfig(64, 33, BF16, BF16, "float32", schedule=ByRows((LinearSchedule(),)))
    kernel = tools.build(emulated, k=tile_linear(cfg, emulated))["k"]
    packed = np.ones((2, 17, 64, 2), tools.dtypes[BF16])
    packed[:, 16, :, 1], packed[1] = 0, np.nan
    x = np.ones(20 * 33 + 64, tools.dtypes[BF16])
    x[20 * 33 :] = np.nan
    y = tools.tensor(np.full((20, 64), np.nan, np.float32))
    rows, weight = tools.tensor(x), tools.tensor(packed)
    kernel(beginning(rows, (20, 33)), beginning(weight, (1, 17, 64, 2)), y)
    assert (y.numpy() == 33).all()


def beginning(tensor, shape):
    """The beginning of a tensor in another shape."""
    import tvm_ffi

    view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, tvm_ffi.Shape(list(shape)), tvm_ffi.dtype(str(tensor.dtype)), 0)


QUANT = [
    ("w8a8", 130, 667, "bfloat16", {"tile_columns": 128, "tile_rows": 32, "tile_blocks": 2}),
    ("w4a8", 70, 300, "float32", {"tile_columns": 64, "tile_wide": True, "tile_blocks": 2}),
]
MORE_QUANT = [
    ("w4a8g64", 33, 20, "float16", {}),
    ("w4a8g128", 64, 512, "bfloat16", {"tile_rows": 32}),
    ("w8a8", 64, 64, "float32", {"tile_prefetch": False}),
]


@pytest.mark.parametrize(
    "cases", [QUANT, pytest.param(MORE_QUANT, marks=pytest.mark.slow)], ids=["usual", "more"]
)
def test_integers(cases, emulated, tools):
    """Against float64 on activations that are rounded as the vector kernels round them."""
    rng = np.random.default_rng(2)
    layouts = [quant_layout(by_name(scheme), n, k, emulated) for scheme, n, k, _, _ in cases]
    functions = {}
    for i, (_, n, _, dtype, fields) in enumerate(cases):
        cfg = QuantLinearConfig(n, layouts[i], dtype, "float32", has_bias=True, tiles_from=1, **fields)
        functions[f"k{i}"] = quant_linear_by_rows(cfg, emulated)
    library = tools.build(emulated, **functions)
    for i, (scheme, n, k, dtype, _) in enumerate(cases):
        weight = weight_of(scheme, n, k)
        packed, values = tools.tensor(layouts[i].pack(weight)), weight.dequantize().astype(np.float64)
        bias = tools.random(rng, (n,), dtype)
        for rows in ROWS:
            x = tools.random(rng, (rows, k), dtype)
            x[rows // 2] *= 100  # each row has a scale of its own
            y = tools.tensor(np.full((rows, n), np.nan, np.float32))
            library[f"k{i}"](tools.tensor(x), packed, tools.tensor(bias), y)
            q, scale = rounded(x)
            check(y.numpy(), q @ values.T * scale + bias.astype(np.float64))


def test_integers_with_gate_and_the_largest_values(emulated, tools):
    """Codes 0 and 255 times -127 and 127 in all columns: sums wrap on the way and come out exact."""
    layout = quant_layout(by_name("w8a8"), 40, 70, emulated, gated=True)
    cfg = QuantLinearConfig(
        40, layout, "float32", "float32", gated=True, activation="relu", has_residual=True, tiles_from=1
    )
    kernel = tools.build(emulated, k=quant_linear_by_rows(cfg, emulated))["k"]
    rng = np.random.default_rng(3)
    codes = np.where(rng.random((80, 70)) < 0.5, 0, 255).astype(np.uint8)
    weight = QuantizedWeight(by_name("w8a8"), codes, np.ones((80, 1), np.float32))
    x = np.where(rng.random((37, 70)) < 0.5, -127, 127).astype(np.float32)
    residual = rng.integers(-50, 50, (37, 40)).astype(np.float32)
    y = tools.tensor(np.full((37, 40), np.nan, np.float32))
    kernel(
        tools.tensor(x),
        tools.tensor(layout.pack(in_turns(weight, layout.n_block))),
        tools.tensor(residual),
        y,
    )
    sums = x.astype(np.int64) @ (codes.astype(np.int64) - 128).T
    exact = np.maximum(sums[:, :40], 0) * sums[:, 40:] + residual
    np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


FLOATS = ["q4g32", pytest.param("q4g32a", marks=pytest.mark.slow), pytest.param("mxfp4", marks=pytest.mark.slow),
          pytest.param("q8", marks=pytest.mark.slow), pytest.param("q3g16", marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("scheme", FLOATS)
def test_weights_that_become_bf16(scheme, emulated, tools):
    tunable = TunableQuantLinear()
    layout = quant_layout(by_name(scheme), 70, 330, emulated)
    task = QuantLinearConfig(
        70, layout, BF16, "float32", has_bias=True, tile_columns=128, tile_blocks=2, tiles_from=1
    )
    kernel = tools.build(emulated, k=quant_linear_by_rows(task, emulated))["k"]
    rng = np.random.default_rng(4)
    for rows in ROWS[::2]:
        case = tunable.case(task, rows, rng)
        arguments = tunable.arguments(task, None, case, emulated)
        values = [tools.tensor(v) for v in arguments.values]
        kernel(*values)
        # weights with their scales, rounded to bf16
        weight = quantized_of(task.layout, case).dequantize().astype(tools.dtypes[BF16]).astype(np.float64)
        expected = case["x"].astype(np.float64) @ weight.T + case["bias"].astype(np.float64)
        error = np.abs(values[arguments.out].numpy() - expected).max() / np.abs(expected).max()
        # float32 arithmetic may round a product to the other neighbour, so single weights may differ by a step
        assert error < 2e-4, (rows, error)


def test_choice_between_vectors_and_tiles(emulated, tools):
    schedule = ByRows(
        (LinearSchedule(), LinearSchedule(tiles_from=0), LinearSchedule(tiles_from=1)), (20, 30)
    )
    start = lambda choice: choice.tiles_from  # noqa: E731
    first, second, third = schedule.choices
    assert segments(schedule, start) == [
        Segment(1, 8, first, False),
        Segment(9, 20, first, True),
        Segment(21, 30, second, False),
        Segment(31, 0, third, True),
    ]
    assert segments(schedule, lambda _: 0)[0] == Segment(1, 20, first, False)
    cfg = LinearConfig(20, 32, BF16, BF16, "float32", schedule=ByRows((LinearSchedule(),)))
    kernel = tools.build(emulated, k=linear_by_rows(cfg, emulated))["k"]
    rng = np.random.default_rng(5)
    weight = tools.random(rng, (20, 32), BF16)
    packed = tools.tensor(cfg.weight_layout(emulated).pack(weight))
    for rows in (1, 8, 9, 40):
        x = tools.random(rng, (rows, 32), BF16)
        y = tools.tensor(np.full((rows, 20), np.nan, np.float32))
        kernel(tools.tensor(x), packed, y)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        assert np.abs(y.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_experts(emulated, tools):
    """Experts with no row, with one, and with more than a task takes; columns and outputs that fill no tile."""
    experts, n, k, rows = 5, 70, 75, 400
    cfg = ExpertConfig(experts, n, k, BF16, BF16, "float32", has_bias=True)
    kernel = ExpertKernel(cfg, ByRows((ExpertSchedule(),)))
    library = tools.build(emulated, k=expert_linear_by_rows(kernel, emulated))
    rng = np.random.default_rng(7)
    weight, bias = tools.random(rng, (experts, n, k), BF16), tools.random(rng, (experts, n), BF16)
    packed = linear_layout(BF16, emulated).pack(weight)
    for few in (39, 40, rows):
        x = tools.random(rng, (few, k), BF16)
        ids = np.where(rng.random(few) < 0.8, 3, rng.integers(0, 3, few))  # none for the last one
        ids[ids == 0] = 1
        ids[few // 2] = 0
        y = tools.tensor(np.full((few, n), np.nan, np.float32))
        library["k"](*(tools.tensor(v) for v in (x, ids, packed, bias)), y)
        exact = np.einsum("rk,rnk->rn", x.astype(np.float64), weight.astype(np.float64)[ids])
        exact += bias.astype(np.float64)[ids]
        assert np.abs(y.numpy() - exact).max() < 1e-5 * np.abs(exact).max()


def test_the_tuner_searches_both_kinds(emulated):
    layout = quant_layout(by_name("w4a8"), 256, 2048, emulated)
    for tunable, config in (
        (TunableLinear(), LinearConfig(256, 2048, BF16, BF16, BF16)),
        (TunableQuantLinear(), QuantLinearConfig(256, layout, BF16, BF16)),
    ):
        task = tunable.task(config)
        rng = np.random.default_rng(6)
        for bucket in tunable.buckets(task):
            space = tunable.space(task, bucket, emulated)
            plain = tunable.space(task, bucket, replace(emulated, tiles=TileUnit.NONE))
            found = [space.random(rng) for _ in range(40)]
            starts = {schedule.tiles_from for schedule in found}
            # either kind, each with fields of its own
            assert len(starts) == 2 and (0 in starts) == (bucket.low >= space.default.tiles_from)
            for schedule in found:
                moved = space.mutate(schedule, rng)
                assert schedule in space and moved in space and moved.tiles_from == schedule.tiles_from
                assert space.cross(schedule, space.default, rng) in space
                assert space.nearest(asdict(schedule)) == schedule
                assert np.isfinite(list(tunable.terms(task, schedule, bucket.low, emulated).values())).all()
            if tunable.name == "quant_linear":  # the other one has too many
                assert len(set(space)) == sum(1 for _ in space) > sum(1 for _ in plain)


def test_the_peak_loops_do_all_that_is_counted(emulated, tools):
    caps = replace(emulated, threads=2)
    kinds = {kind.operands: kind for kind in multiply_kinds(caps)}
    assert [kinds["bf16"], kinds["int8"]] == list(TILE_KINDS)
    library = tools.build(caps, **{k.operands: multiply_kernel(k, caps) for k in TILE_KINDS})
    ones = {"bf16": 0x3F803F80, "int8": 0x01010101}
    for kind in TILE_KINDS:
        out = tools.tensor(np.zeros((2, 16), kind.dtype))
        library[kind.operands](tools.tensor(np.full((2, 16), ones[kind.operands], np.int32)), out, 3)
        assert np.all(out.numpy() == 3 * 4 * UNROLL * kind.per_lane)
        # sixteen rows of these sums, each product a multiplication and an addition
        assert kind.operations(16) * 3 == 2 * 16 * out.numpy()[0].sum()


def products_of(text):
    """What lies between the first and the last product of each basic block that has some."""
    found, block = [], []
    for line in [*text.splitlines(), "end:"]:
        line = line.split("#")[0].strip()
        if re.fullmatch(r"[.\w$]+:", line) or re.match(r"j\w+\s", line):
            at = [i for i, instruction in enumerate(block) if instruction.startswith("tdp")]
            if at:
                found.append(block[at[0] : at[-1] + 1])
            block = []
        elif line and not line.startswith("."):
            block.append(line)
    return found


def code_for(kind, caps, **fields):
    """The kernel of a class on 1024 x 1024 weights."""
    if kind == "bf16":
        schedule = ByRows((LinearSchedule(**fields),))
        return tile_linear(LinearConfig(1024, 1024, BF16, BF16, BF16, schedule=schedule), caps)
    layout = quant_layout(by_name(kind), 1024, 1024, caps)
    return quant_linear_by_rows(QuantLinearConfig(1024, layout, BF16, BF16, tiles_from=1, **fields), caps)


@pytest.mark.parametrize(
    ("kind", "dot"),
    [
        ("bf16", "tdpbf16ps"),
        pytest.param("w8a8", "tdpbsud", marks=pytest.mark.slow),
        pytest.param("w4a8g128", "tdpbssd", marks=pytest.mark.slow),
        pytest.param("q4g32", "tdpbf16ps", marks=pytest.mark.slow),
    ],
)
def test_code_for_the_unit(kind, dot, tools):
    caps = capabilities("x86-64-v4-amx")
    text = tools.assembly(caps, k=code_for(kind, caps))
    blocks = products_of(text)
    shapes = set()
    for block in blocks:
        words = [instruction.split()[0] for instruction in block]
        products = [instruction.split()[1:] for instruction in block if instruction.startswith(dot)]
        assert len(products) == sum(word.startswith("tdp") for word in words)
        shapes.add(tuple(len({p[i] for p in products}) for i in (2, 1, 0)))
        # sums stay in their tiles; no vectors, and nothing is stored; at most addresses come from the stack
        assert not {"tilestored", "tilezero", "ldtilecfg", "tilerelease"} & set(words)
        assert not [i for i in block if re.search(r"%[xyz]mm|^mov.*\)$", i)], block
        assert kind != "bf16" or not [i for i in block if "%rsp" in i], block
        loads = words.count("tileloadd")
        assert loads <= len(products) * 5 // 4
        # the rest is addresses and prefetches; sixteen rows ask for as much memory as more rows do, in fewer steps
        fetches = sum(word.startswith("prefetch") for word in words)
        rest = len(words) - loads - len(products) - fetches
        assert rest <= len(products) * (1 if kind == "bf16" else 2), block
        assert fetches <= len(products) or len({p[1] for p in products}) == 1
    # (tiles of sums, left operands, right operands): two by two; sixteen rows one by four, with three in turns
    assert shapes == {(4, 2, 2), (4, 1, 3)}
    assert text.count("ldtilecfg") == text.count("tilerelease") == 2
