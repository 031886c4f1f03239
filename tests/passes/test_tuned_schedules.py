"""Tuning records reach the kernels: layouts, thresholds, and the tasks that are read back from a lowered module."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from llmc import ir
from llmc.ops import EXPERT_LINEAR, ExpertLinearAttrs
from llmc.passes.lower_experts import LowerExperts
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.rewrite import KERNEL_ATTR
from llmc.quant.schemes import by_name
from llmc.schedules import emit as e
from llmc.schedules import tune_qlinear
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule, PrefillSchedule
from llmc.schedules.choice import ByRows
from llmc.schedules.layout import BlockedLayout
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.records import Record
from llmc.schedules.tunable import bucket_of, code_of
from llmc.schedules.tune_qexperts import QuantExpertKernel, quant_expert_linear_by_rows
from llmc.schedules.tune_qlinear import QuantLinearSchedule
from llmc.schedules.tuned_choice import Tuned
from llmc.targets.backend import get
from llmc.tune.extract import TRAFFIC, KernelUse, jobs_of, kernel_uses, shares
from tests.passes.graphs import Model, linear, reference
from tests.passes.test_step_functions import Compiled

BACKEND, CAPS = get("cpu")
BUILT_FOR = {"preset": CAPS.preset, "tvm": "1", "device": "here"}
F32 = ("float32", "float32", "float32")


def records(config, rows, schedule, name="linear", ratio=0.5):
    tunable = next(t for t in BACKEND.tunables() if t.name == name)
    bucket = bucket_of(rows)
    task = tunable.to_values(tunable.task(config))
    return Record(
        name,
        1,
        task,
        bucket.low,
        bucket.high,
        rows,
        vars(schedule),
        seconds=1.0,
        ratio=ratio,
        share=0.1,
        code=code_of(tunable, CAPS),
        **BUILT_FOR,
    )


def tuned(*known):
    return Tuned([known], CAPS, "1", "here", BACKEND.tunables())


def kernel_config(module, name):
    return json.loads(module[name].attrs[KERNEL_ATTR])["config"]


def lower(known, weights, body):
    m = Model()
    params = [m.param(name, *shape) for name, *shape in weights]
    x = m.param("x", 1, 8, 32)
    return LowerLinear(CAPS, known)(m.build(lambda emit: body(emit, x, *params)))


def test_a_record_decides_layout_and_thresholds():
    narrow = LinearSchedule(vectors=1, prefetch=0)
    known = tuned(
        records(LinearConfig(48, 32, *F32), 1, narrow),
        records(LinearConfig(48, 32, *F32), 8, replace(narrow, rows_tile=2)),
    )
    out = lower(known, [("w", 48, 32)], lambda emit, x, w: linear(emit, x, w))
    (packed,) = [p for p in out.params if p.source == "w" and p.layout != "rows"]
    assert packed.shape[2] == CAPS.lanes_f32 and BlockedLayout.parse(packed.layout).n_block == CAPS.lanes_f32
    config = LinearConfig.from_json(kernel_config(out.module, "linear_48_32"))
    assert config.schedule.limits == (1, 4, 8) and config.schedule.at(1) == narrow
    assert config.schedule.at(6).rows_tile == 2 and config.schedule.at(600) == LinearSchedule(vectors=1)
    assert [r.rows for r in known.used.values()] == [1, 8]
    # and without records nothing is different from before
    plain = lower(tuned(), [("w", 48, 32)], lambda emit, x, w: linear(emit, x, w))
    assert LinearConfig.from_json(kernel_config(plain.module, "linear_48_32")).schedule.choices == (
        LinearSchedule(),
    )


def test_kernels_of_one_weight_agree_in_its_layout():
    """The second kernel wants another layout, and has to do with that of the first."""
    known = tuned(
        records(LinearConfig(48, 32, *F32), 1, LinearSchedule(vectors=1)),
        records(LinearConfig(48, 32, *F32, has_bias=True), 1, LinearSchedule(vectors=2)),
    )

    def body(emit, x, w, b):
        first = linear(emit, x, w)
        return emit(relax.op.add(emit(relax.op.add(linear(emit, x, w), b)), first))

    out = lower(known, [("w", 48, 32), ("b", 48)], body)
    assert len([p for p in out.params if p.source == "w" and p.layout != "rows"]) == 1
    configs = [
        kernel_config(out.module, gv.name_hint)
        for gv in out.module.get_global_vars()
        if gv.name_hint != "main"
    ]
    assert sorted(c["has_bias"] for c in configs) == [False, True]
    assert {c["schedule"]["choices"][0]["vectors"] for c in configs} == {1}
    layouts = {LinearConfig.from_json(c).weight_layout(CAPS).n_block for c in configs}
    assert layouts == {CAPS.lanes_f32}


def test_a_quantized_weight_gets_its_records(monkeypatch):
    layout = quant_layout(by_name("q8"), 48, 32, CAPS)
    config = QuantLinearConfig(48, layout, "float32", "float32")
    known = tuned(records(config, 1, QuantLinearSchedule(prefetch=512), "quant_linear"))
    seen = []

    def stand_in(config, caps):  # the real one takes seconds to build
        seen.append(config)
        built = []
        with e.kernel(built):
            t = e.dim("T")
            e.tensor("x", [1, t, 32], "float32")
            e.tensor("w", list(config.layout.packed_shape), "uint8")
            y = e.tensor("y", [1, t, 48], "float32")
            with e.root(), e.loop(t) as i:
                e.store(e.flat(y, t * 48), i, e.f32(config.prefetch), 1)
        return built[0]

    monkeypatch.setattr(tune_qlinear, "quant_linear", stand_in)
    m = Model()
    w = m.param("w", 48, 32)
    x = m.param("x", 1, 8, 32)
    graph = m.build(lambda emit: linear(emit, x, w))
    infos = (replace(graph.params[0], scheme="q8"), graph.params[1])
    out = LowerLinear(CAPS, known)(replace(graph, params=infos))
    assert [c.prefetch for c in seen] == [512, 2304] and len(known.used) == 1
    (name,) = [gv.name_hint for gv in out.module.get_global_vars() if gv.name_hint != "main"]
    assert kernel_config(out.module, name)["layout"]["scheme"] == "q8"


@pytest.mark.parametrize("scheme", ["q4g32", "w4a8"])
def test_quantized_experts_get_their_records(scheme):
    """Decode of one token with two experts each, and all else by default."""
    layout = quant_layout(by_name(scheme), 48, 32, CAPS)
    kind = "int_experts" if scheme == "w4a8" else "quant_experts"
    tunable = next(t for t in BACKEND.tunables() if t.name == kind)
    schedule = replace(tunable.schedule_type(), by_expert=True)
    known = tuned(records(QuantExpertConfig(4, layout, "float32", "float32"), 2, schedule, kind))
    m = Model()
    weight, table = m.param("w", 4, 48, 32), m.param("table", 4, 32)

    def body(emit):
        ids, x = emit(relax.op.astype(m.ids, "int64")), emit(relax.op.take(table, m.ids, axis=0))
        out = ir.tensor_type([m.tokens, 48], "float32")
        return emit(ir.opaque_call(EXPERT_LINEAR, [x, ids, weight], ExpertLinearAttrs().to_json(), out))

    graph = m.build(body)
    infos = (replace(graph.params[0], scheme=scheme), graph.params[1])
    out = LowerExperts(CAPS, known)(replace(graph, params=infos))
    func = out.module[f"expert_linear_{scheme}_48_32"]
    assert len(known.used) == 1
    assert QuantExpertConfig.from_json(json.loads(func.attrs[KERNEL_ATTR])["config"]).layout == layout
    kernel = QuantExpertKernel(
        QuantExpertConfig(4, layout, "float32", "float32"),
        ByRows((tunable.schedule_type(), schedule, tunable.schedule_type()), (1, 4)),
    )
    expected = quant_expert_linear_by_rows(kernel, CAPS)
    tvm.ir.assert_structural_equal(func.body, expected.body, map_free_vars=True)


@pytest.fixture(scope="module")
def compiled():
    attention = AttentionConfig(4, 2, 16, 16, "float32", "float32", 16, 2, 0.25)
    linears = [LinearConfig(n, 64, *F32) for n in (32, 50, 64)]
    known = tuned(
        *(records(c, 1, LinearSchedule(vectors=1, unroll=2, prefetch=0)) for c in linears),
        *(
            records(c, 40, LinearSchedule(vectors=1, t_block=24, rows_tile=3, block_fast=True))
            for c in linears
        ),
        records(attention, 40, PrefillSchedule(tile_rows=16, keys=32), "attention_prefill"),
        records(attention, 1, DecodeSchedule(splits=2, keys=32, least_keys=64), "attention_decode"),
        records(attention, 3, DecodeSchedule(splits=2, keys=64), "attention_decode"),
    )
    return Compiled(known)


def test_a_tuned_model_computes_what_the_default_does(compiled):
    ids = np.random.default_rng(3).integers(0, 50, 41)
    expected = reference(compiled.weights, ids)
    first = compiled.run("step", [([1, 2, 3], 0, ids[:40])])
    np.testing.assert_allclose(first, expected[:40], rtol=1e-4, atol=1e-4)
    last = compiled.run("decode", [([1, 2, 3], 40, ids[40:])])
    np.testing.assert_allclose(last, expected[40:], rtol=1e-4, atol=1e-4)


def test_tasks_are_read_back_from_the_module(compiled):
    uses = kernel_uses(compiled.step.module)
    assert [KernelUse.from_json(json.loads(json.dumps(use.to_json()))) for use in uses] == list(uses)
    heads = {
        (u.name, u.function, u.rows, u.calls)
        for u in uses
        if u.kind == "LinearConfig" and u.config["n"] == 50
    }
    assert {(f, rows, calls) for _, f, rows, calls in heads} == {("step", "R", 1), ("decode", "R", 1)}
    attention = {u.name: (u.function, u.rows, u.calls) for u in uses if u.kind == "AttentionConfig"}
    assert ("step", "T", 2) in attention.values() and ("decode", "T", 2) in attention.values()
    jobs = jobs_of(uses, BACKEND.tunables(), CAPS, max_batch=4, max_step_tokens=64)
    names = {job.tunable.name for job in jobs}
    assert {"linear", "attention_prefill", "attention_decode"} <= names
    assert len({(job.tunable.name, json.dumps(job.values), job.bucket) for job in jobs}) == len(jobs)
    # a prompt asks for the logits of one row; larger batches and steps than the artifact's do not occur
    head = [job for job in jobs if job.tunable.name == "linear" and job.task.n == 50]
    assert sorted(job.rows for job in head) == [1, 4]
    assert max(job.rows for job in jobs) == 64
    for job in jobs:
        job.roofline, job.default_seconds = 0.5, 1.0
    shares(jobs)
    assert sum(job.share for job in jobs) == pytest.approx(1)
    shapes = {number for job in jobs for number, _ in job.calls}
    assert {TRAFFIC[number].tokens for number in shapes} == {1, 4, 64}
