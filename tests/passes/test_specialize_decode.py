"""SpecializeDecode: decode is step with another attention kernel, which also rotates and appends."""

from __future__ import annotations

import pytest
from tvm import relax

from llmc import ir
from llmc.ops import AttentionAttrs
from llmc.passes import order
from llmc.passes.plan_kv_cache import PlanKVCache
from llmc.passes.rewrite import bindings_of
from llmc.targets.backend import get
from tests.passes.graphs import attention_model

CALLS = ("relax.call_tir", "relax.call_tir_inplace")


def lowered(disabled=(), **options):
    """StepModule of a small model, up to and with SpecializeDecode."""
    backend, caps = get("cpu")
    graph = attention_model(**options)
    for _, graph_pass in order.graph_phase(caps, disabled=disabled):
        graph = graph_pass(graph)
    step = order.make_step(caps, PlanKVCache(page_size=16, kv_dtype=None, max_seq_len=64)(graph))(graph)
    bounds = {"T": 64, "B": 4, "R": 64}
    for _, step_pass in order.step_phase(caps, backend.tvm_target(caps), bounds, disabled):
        step = step_pass(step)
    return step


def calls(step, function):
    """(kernel, arguments) of each call."""
    return [
        (b.value.args[0].name_hint, len(b.value.args[1].fields))
        for b in bindings_of(step.module[function])
        if ir.op_name(b.value) in CALLS
    ]


def test_the_rotating_kernel_goes_into_attention():
    step = lowered()
    before, after = calls(step, "step"), calls(step, "decode")
    # slots and pools of the one, and starts, lengths and tables of the other
    assert ("rope_append_0", 7) in before and ("attention_prefill_0", 7) in before
    expected = [
        ("attention_decode_0", 10) if name == "attention_prefill_0" else (name, n)
        for name, n in before
        if name != "rope_append_0"
    ]
    assert after == expected
    assert [n for n, _ in after].count("attention_decode_0") == 2


def test_everything_else_is_shared():
    step = lowered()
    names = {n for f in ("step", "decode") for n, _ in calls(step, f)}
    kernels = {gv.name_hint for gv in step.module.get_global_vars()} - {"step", "decode"}
    assert names == kernels


def test_disabled_it_leaves_the_rotation_alone():
    step = lowered(disabled=("SpecializeDecode",))
    expected = [(n.replace("attention_prefill", "attention_decode"), k) for n, k in calls(step, "step")]
    assert calls(step, "decode") == expected
    assert ("rope_append_0", 7) in expected


def test_heads_that_are_not_fused_are_appended_by_a_kernel_of_their_own():
    step = lowered(disabled=("FuseRoPE",))
    names = [n for n, _ in calls(step, "decode")]
    assert names.count("kv_append_0") == names.count("attention_decode_0") == 2


def test_a_layer_that_reads_the_cache_of_another_appends_nothing():
    step = lowered(layers=3, share={2: 0})
    inplace = [b.value for b in bindings_of(step.module["decode"]) if ir.is_op(b.value, CALLS[1])]
    assert len(inplace) == 2  # three attention blocks, two that write
    names = [n for n, _ in calls(step, "decode")]
    assert sum(n.startswith("attention_decode") for n in names) == 3
    assert not any(n.startswith("rope") for n in names)


def test_windows_have_their_own_kernels():
    step = lowered(attrs=lambda i: AttentionAttrs(layer=i, scale=0.25, window=0 if i % 2 else 5))
    names = [n for n, _ in calls(step, "decode")]
    assert {n for n in names if n.startswith("attention")} == {"attention_decode_0", "attention_decode_1"}


@pytest.mark.parametrize("disabled", [(), ("SpecializeDecode",), ("FuseRoPE", "ViewReshapes")])
def test_both_functions_are_well_formed_over_symbolic_sizes(disabled):
    step = lowered(disabled=disabled)
    relax.analysis.well_formed(step.module)  # raises
    for function in ("step", "decode"):
        sizes = {v.name for v in relax.analysis.defined_symbolic_vars(step.module[function])}
        assert {"B", "R"} <= sizes
