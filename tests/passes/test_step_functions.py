"""MakeStepFunction and SpecializeDecode: ragged batches over pages compute what one whole sequence computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from llmc.ops import AttentionAttrs
from llmc.packing import pack_sources
from llmc.passes import order
from llmc.passes.plan_kv_cache import PlanKVCache
from llmc.schedules.tuned_choice import Tuned
from llmc.targets.backend import get
from llmc.targets.codegen import build_executable
from tests.passes.graphs import attention_model, reference

PAGE = 16
ALTERNATING = {"attrs": lambda i: AttentionAttrs(layer=i, scale=0.25, window=0 if i % 2 else 5)}
CHUNKED = {"attrs": lambda i: AttentionAttrs(layer=i, scale=0.25, chunk=8)}
SHARED = {"layers": 3, "share": {2: 0}}


class Compiled:
    """step and decode of a small graph, with a page table per group."""

    def __init__(self, tuned: Tuned | None = None, **model: object) -> None:
        backend, caps = get("cpu")
        target = backend.tvm_target(caps)
        lowered = attention_model(**model)
        for _, graph_pass in order.graph_phase(caps, None, tuned):
            lowered = graph_pass(lowered)
        self.plan = PlanKVCache(page_size=PAGE, kv_dtype=None, max_seq_len=64)(lowered)
        step = order.make_step(caps, self.plan, tuned)(lowered)
        for _, step_pass in order.step_phase(caps, target, {"T": 64, "B": 4, "R": 64}):
            step = step_pass(step)
        self.step = step
        self.inputs = [spec.name for spec in step.inputs]
        module = step.module
        self.kernels = {gvar.name_hint for gvar in module.get_global_vars()}
        with target:
            for _, build_pass in order.build_phase():
                module = build_pass(module)
        self.vm = relax.VirtualMachine(build_executable(module, target), tvm.cpu())
        rng = np.random.default_rng(0)
        self.weights = {}
        params = []
        shapes = {p.source: p.shape for p in attention_model(**model).params}
        for name, shape in shapes.items():
            self.weights[name] = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        for param in step.params:
            params.append(pack_sources(param, lambda name: torch.from_numpy(self.weights[name])))
        self.params = tuple(tvm.runtime.tensor(p) for p in params)
        self.forget()

    def forget(self) -> None:
        """Empty pages. What was never written must never be read: NaN would spread."""
        shapes = [s for g in self.plan.groups for s in (g.k_shape(32, PAGE), g.v_shape(32, PAGE))]
        self.pools = tuple(tvm.runtime.tensor(np.full(s, np.nan, np.float32)) for s in shapes)

    def run(self, function, batch, rows=None):
        """batch: (table of pages, tokens in the cache already, new token ids) per sequence."""
        ids, positions, start, context, slots = [], [], [0], [], []
        for table, past, new in batch:
            where = np.arange(past, past + len(new))
            ids += list(new)
            positions += list(where)
            start.append(len(ids))
            context.append(past + len(new))
            slots += [table[p // PAGE] * PAGE + p % PAGE for p in where]
        width = max(len(table) for table, _, _ in batch)
        tables = [list(t) + [0] * (width - len(t)) for t, _, _ in batch]
        given = {"input_ids": ids, "positions": positions, "query_start": start, "context_len": context}
        for g in range(len(self.plan.groups)):
            given[f"block_table_{g}"] = tables
            given[f"slot_{g}"] = slots
        given["logit_rows"] = range(len(ids)) if rows is None else rows
        arrays = [tvm.runtime.tensor(np.asarray(given[name], np.int32)) for name in self.inputs]
        return self.vm[function](*arrays, self.pools, self.params).numpy()


@pytest.fixture(scope="module")
def compiled_once():
    return Compiled()


@pytest.fixture
def full(compiled_once):
    """attention_model as it is, with empty pages."""
    compiled_once.forget()
    return compiled_once


@pytest.mark.parametrize(
    "model", [{}, ALTERNATING, CHUNKED, SHARED], ids=["full", "window", "chunk", "shared"]
)
def test_ragged_prefill_then_decode(model, full):
    compiled = Compiled(**model) if model else full
    rng = np.random.default_rng(1)
    lengths = [37, 20]
    ids = [rng.integers(0, 50, n) for n in lengths]
    expected = [reference(compiled.weights, i, **model) for i in ids]
    tables = [[7, 3, 9], [1, 4]]  # scattered, to see a wrong table
    prefilled = [30, 9]
    got = compiled.run("step", [(t, 0, i[:p]) for t, i, p in zip(tables, ids, prefilled, strict=True)])
    want = np.concatenate([e[:p] for e, p in zip(expected, prefilled, strict=True)])
    np.testing.assert_allclose(got, want, atol=2e-5)
    for offset in range(7):  # both sequences one token further, across a page border
        got = compiled.run(
            "decode",
            [
                (t, p + offset, i[p + offset : p + offset + 1])
                for t, i, p in zip(tables, ids, prefilled, strict=True)
            ],
        )
        want = np.stack([e[p + offset] for e, p in zip(expected, prefilled, strict=True)])
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_chunked_prefill_mixed_with_decode_and_selected_rows(full):
    compiled = full
    ids = np.random.default_rng(2).integers(0, 50, 40)
    other = np.random.default_rng(3).integers(0, 50, 12)
    expected, expected_other = reference(compiled.weights, ids), reference(compiled.weights, other)
    compiled.run("step", [([2, 5, 6], 0, ids[:17]), ([8], 0, other[:11])])
    got = compiled.run("step", [([2, 5, 6], 17, ids[17:]), ([8], 11, other[11:])], rows=[22, 23, 0])
    np.testing.assert_allclose(got, np.stack([expected[39], expected_other[11], expected[17]]), atol=2e-5)


def test_both_functions_share_every_kernel_but_attention(full):
    kernels = full.kernels
    assert {k for k in kernels if "decode" in k} == {"decode", "attention_decode_0"}
    assert not [k for k in kernels if k.endswith("_1") and k.startswith("linear")]
