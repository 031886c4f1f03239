"""Every kernel class that can be tuned: its space, its JSON, and its kernels against its reference."""

import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from llmc.quant.schemes import SCHEMES, by_name
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.linear import LinearConfig
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tunable import BUCKETS, Bucket, bucket_of
from llmc.schedules.tune_attention import TunableDecode, TunablePrefill
from llmc.schedules.tune_experts import TunableExperts, active_experts, expert_ids
from llmc.schedules.tune_linear import TunableLinear
from llmc.schedules.tune_qexperts import TunableIntExperts, TunableQuantExperts
from llmc.schedules.tune_qlinear import TunableIntLinear, TunableQuantLinear
from llmc.targets.backend import get
from llmc.tune.measuring import largest_error

CAPS = get("cpu")[1]
ATTENTION = AttentionConfig(4, 2, 16, 16, "float32", "float32", 16, 3, 0.25, window=20, token_major=True)
# tunable, config, rows to check
TASKS = {
    "linear": (TunableLinear(), LinearConfig(200, 300, "float32", "float32", "float32", has_bias=True, lead=1), 7),
    "linear-gated": (
        TunableLinear(),
        LinearConfig(
            96, 64, "bfloat16", "bfloat16", "bfloat16",
            activation="silu", gated=True, gate_second=True, has_bias=True, has_residual=True,
        ),
        40,
    ),
    "linear-gelu": (TunableLinear(), LinearConfig(64, 48, "float16", "float16", "float32", activation="gelu"), 1),
    "quant": (
        TunableQuantLinear(),
        QuantLinearConfig(40, quant_layout(by_name("q8"), 40, 64, CAPS), "float32", "float32", has_bias=True),
        3,
    ),
    "quant-gated": (
        TunableQuantLinear(),
        QuantLinearConfig(
            48, quant_layout(by_name("q4g32a"), 48, 64, CAPS, gated=True), "bfloat16", "bfloat16",
            activation="silu", gated=True, has_residual=True,
        ),
        20,
    ),
    "quant-int": (
        TunableIntLinear(),
        QuantLinearConfig(
            48, quant_layout(by_name("w4a8"), 48, 64, CAPS, gated=True), "bfloat16", "bfloat16",
            activation="silu", gated=True, has_residual=True,
        ),
        5,
    ),
    "quant-outliers": (
        TunableIntLinear(),
        QuantLinearConfig(40, quant_layout(by_name("w8a8o"), 40, 130, CAPS), "bfloat16", "float32", has_bias=True),
        9,
    ),
    "quant-e4m3": (
        TunableQuantLinear(),
        QuantLinearConfig(40, quant_layout(by_name("fp8a8g128"), 40, 300, CAPS), "bfloat16", "bfloat16"),
        4,
    ),
    "quant-supers": (
        TunableQuantLinear(),
        QuantLinearConfig(40, quant_layout(by_name("q4k"), 40, 300, CAPS), "bfloat16", "bfloat16"),
        2,
    ),
    "quant-order": (
        TunableQuantLinear(),
        QuantLinearConfig(
            24, quant_layout(by_name("q4g32ap"), 24, 96, CAPS, gated=True), "float32", "float32", gated=True
        ),
        50,
    ),
    "experts": (TunableExperts(), ExpertConfig(3, 70, 40, "bfloat16", "bfloat16", "float32", has_bias=True), 9),
    "quant-experts": (
        TunableQuantExperts(),
        QuantExpertConfig(5, quant_layout(by_name("q6k"), 40, 300, CAPS), "bfloat16", "float32", "int32"),
        3,
    ),
    "quant-experts-order": (
        TunableQuantExperts(),
        QuantExpertConfig(3, quant_layout(by_name("q4g32p"), 40, 70, CAPS), "float32", "float32", has_bias=True),
        90,
    ),
    "quant-int-experts": (
        TunableIntExperts(),
        QuantExpertConfig(4, quant_layout(by_name("w4a8o"), 70, 130, CAPS), "bfloat16", "bfloat16", has_bias=True),
        20,
    ),
    "prefill": (TunablePrefill(), ATTENTION, 40),
    "decode": (TunableDecode(), ATTENTION, 3),
    "decode-codes": (TunableDecode(), replace(ATTENTION, dtype="bfloat16", kv_dtype="int8", sinks_dtype=""), 3),
}  # fmt: skip


def test_buckets_cover_every_number_of_rows():
    for rows in range(1, 2000):
        bucket = bucket_of(rows)
        assert bucket.low <= rows and (rows <= bucket.high or not bucket.high)
    assert [str(b) for b in BUCKETS] == ["1", "2-4", "5-8", "9-16", "17-64", "65-512", "513+"]
    assert Bucket(65, 512).rows(300) == 300 and Bucket(513, 0).rows(4096) == 1024


def test_the_target_lists_them():
    names = [tunable.name for tunable in get("cpu")[0].tunables()]
    assert len(set(names)) == len(names) and {"linear", "attention_prefill", "attention_decode"} <= set(names)


@pytest.mark.parametrize("name", TASKS)
def test_space(name, best):
    tunable, config, _ = TASKS[name]
    task = tunable.task(config)
    rng = np.random.default_rng(0)
    for bucket in tunable.buckets(task)[:: 3 if name == "linear" else 5]:
        space = tunable.space(task, bucket, best)
        members = list(itertools.islice(space, 3000))
        assert len(set(members)) == len(members) >= 5
        assert space.default in space
        assert all(member in space for member in members[:: max(1, len(members) // 20)])
        for _ in range(20):
            member = space.random(rng)
            moved = space.mutate(member, rng)
            assert member in space and moved in space and space.cross(member, moved, rng) in space
            assert space.nearest(asdict(member)) == member
            assert tunable.schedule_type(**json.loads(json.dumps(asdict(member)))) == member
            assert all(isinstance(v, int) for v in asdict(member).values())
        terms = tunable.terms(task, members[-1], bucket.low, best)
        assert all(np.isfinite(v) for v in terms.values())


def test_a_config_has_one_kernel_class():
    """Configs with integer activations share their type with those without."""
    tunables = get("cpu")[0].tunables()
    for tunable, config, _ in TASKS.values():
        takes = [t.name for t in tunables if t.takes(config)]
        assert tunable.name in takes
        assert len(takes) == (2 if isinstance(config, AttentionConfig) else 1)


@pytest.mark.parametrize("name", TASKS)
def test_task_as_json(name):
    tunable, config, _ = TASKS[name]
    task = tunable.task(config)
    values = json.loads(json.dumps(tunable.to_values(task)))
    assert tunable.from_values(values) == task
    assert tunable.task(task) == task
    with pytest.raises(ValueError, match="no task"):
        tunable.from_values({**values, "colour": 3})


def _some_slow(names):
    """What differs from another by its weights only takes its seconds in slow runs."""
    slow = {"quant-order", "quant-e4m3", "quant-experts-order"}
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", _some_slow(TASKS))
def test_kernels_compute_the_reference(name, best, tools):
    tunable, config, rows = TASKS[name]
    task = tunable.task(config)
    bucket = bucket_of(rows)
    space = tunable.space(task, bucket if bucket in tunable.buckets(task) else tunable.buckets(task)[0], best)
    rng = np.random.default_rng(1)
    # quantized kernels take seconds to build, and their schedules are two numbers
    more = 0 if name.startswith("quant") else 2
    schedules = [space.default, *(space.random(rng) for _ in range(more))]
    if name == "quant-experts":
        schedules.append(replace(space.default, by_expert=True, prefetch=0))
    library = tools.build(
        best, **{f"k{i}": tunable.candidate(task, s, bucket, best) for i, s in enumerate(schedules)}
    )
    case = tunable.case(task, rows, rng)
    expected = tunable.reference(task, case)
    for i, schedule in enumerate(schedules):
        arguments = tunable.arguments(task, schedule, case, best)
        values = [v if isinstance(v, int) else tools.tensor(v) for v in arguments.values]
        library[f"k{i}"](*values)
        found = values[arguments.out].numpy().astype(np.float32)
        assert largest_error(found, expected, tunable.tolerance(task)) < 1, schedule
        # the check notices what is a little off
        wrong = found + 3 * tunable.tolerance(task) * np.sqrt(np.mean(expected**2))
        assert largest_error(wrong, expected, tunable.tolerance(task)) > 1
    work = tunable.work(task, rows)
    assert work.bytes > 0 and work.operations > 0


@pytest.mark.parametrize("name", [*SCHEMES, "nf4f", "q4g32b", "q5g16o", "q4k", "q5k", "q6k", "q2g96afp"])
def test_weights_of_every_scheme_can_be_made(name: str) -> None:
    layout = quant_layout(by_name(name), 64, 512, CAPS)
    for kinds, config in (
        ((TunableQuantLinear, TunableIntLinear), QuantLinearConfig(64, layout, "bfloat16", "bfloat16")),
        ((TunableQuantExperts, TunableIntExperts), QuantExpertConfig(3, layout, "bfloat16", "bfloat16")),
    ):
        (tunable,) = [kind() for kind in kinds if kind().takes(config)]
        task = tunable.task(config)
        made = tunable.weights(task, np.random.default_rng(0))
        packed = tunable.pack(task, tunable.schedule_type(), made, CAPS)
        again = layout.unpack(packed)
        for array in ("codes", "scales", "zeros", "offsets", "order", "outlier_weights"):
            assert (array in made) == (getattr(again, array) is not None)
            if array in made:
                np.testing.assert_array_equal(getattr(again, array), made[array])
        assert 0.1 < np.std(again.dequantize()) < 2  # sums of about one


def test_calls_of_an_expert_kernel_read_other_experts() -> None:
    """One token's experts are a few megabytes, which a cache would hold from call to call."""
    rng = np.random.default_rng(0)
    made = expert_ids(128, 8, "int64", rng)
    sets = [made["ids"], *made["other_ids"]]
    assert len(sets) == 15 and len({int(i) for ids in sets for i in ids}) == 120 and sets[0].dtype == np.int64
    assert len(set(made["ids"])) == 8 == active_experts(128, 8)
    # two kernels that are called in turns get all sets
    for experts, rows in ((8, 2), (8, 64), (4, 4), (2, 8), (64, 512)):
        made = expert_ids(experts, rows, "int32", rng)
        assert (
            len(made["other_ids"]) % 2 == 0 and made["ids"].shape == (rows,) and made["ids"].max() < experts
        )
    tunable, config, _ = TASKS["quant-experts"]
    task = tunable.task(config)
    case = tunable.case(task, 1, rng)
    arguments = tunable.arguments(task, tunable.schedule_type(), case, CAPS)
    assert arguments.cold == (2,) and arguments.out == 3
    np.testing.assert_array_equal(np.stack(arguments.others[1]), case["other_ids"])
