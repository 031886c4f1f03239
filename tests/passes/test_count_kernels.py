"""CountKernels: what is counted is what the virtual machine calls, and what a kernel does is counted right."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from tvm import relax
from tvm.relax.vm_build import _vmcodegen

from llmc.kernel_work import Formula, Workload
from llmc.passes import order
from llmc.passes.count_kernels import CountKernels
from llmc.pipeline.lower import capture_graph, lower_graph, rewrite_graph
from llmc.spec import CompileSpec
from llmc.stages import StageRunner
from llmc.targets.backend import get
from tools.tiny_configs import VOCAB, tiny_config

CONTEXT = 300


def lowered(model_type: str, dtype: str, **options: object):
    """(spec, StepModule) of a tiny random model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation="eager").eval()
    spec = CompileSpec.from_json({"model": "tiny", "dtype": dtype, "max_batch": 2, **options})
    backend, caps = get(spec.target)
    with StageRunner(spec) as runner:
        source, graph = capture_graph(model, spec)
        rewritten = rewrite_graph(graph, spec, source, runner)
        step = lower_graph(rewritten, spec, source, caps, backend.tvm_target(caps), runner)
    return spec, step


def called(spec: CompileSpec, step) -> dict[str, list[str]]:
    """Kernels in the order in which the compiled functions call them, read from the bytecode."""
    backend, caps = get(spec.target)
    builder = relax.ExecBuilder()
    with backend.tvm_target(caps):
        module = step.module
        for _, apply in order.build_phase():
            module = apply(module)
    _vmcodegen(
        builder, module
    )  # as relax.build does before it makes machine code, which nothing here looks at
    text = builder.get().as_text()
    found: dict[str, list[str]] = {}
    for name, body in re.findall(r"^@(step|decode):\n(.*?)(?=^@|\Z)", text, re.M | re.S):
        names = re.findall(r"^\s+call\s+(\S+)", body, re.M)
        found[name] = [n for n in names if not n.startswith("vm.builtin") and n != "shape_func"]
    return found


@pytest.mark.parametrize("dtype", [pytest.param("f32", marks=pytest.mark.slow), "bf16"])
def test_a_llama_block_is_seven_kernels_in_the_compiled_module(dtype: str) -> None:
    spec, step = lowered("llama", dtype)
    kernels = CountKernels()(step)
    bytecode = called(spec, step)
    for function, most in (("decode", 7), ("step", 8)):
        calls = bytecode[function]
        attention = [i for i, n in enumerate(calls) if n.startswith("attention_")]
        blocks = [calls[a:b] for a, b in itertools.pairwise(attention)]
        assert len(blocks) == 1
        for block in blocks:
            assert len(block) <= most, block
            assert not any(re.search("slice|transpose|reshape|concat", n) for n in block)
        # the table is of the same calls
        listed = {k.name: 0 for k in kernels[function]}
        for k in kernels[function]:
            listed[k.name] += k.calls
        assert listed == {n: calls.count(n) for n in calls}
        assert sum(k.block_calls for k in kernels[function]) == len(blocks[0])


def test_bytes_and_operations_of_a_llama() -> None:
    _, step = lowered("llama", "bf16")
    config = tiny_config("llama")
    work = Workload.decode(1, CONTEXT)
    d, f, dim = config.hidden_size, config.intermediate_size, config.head_dim
    h, hk, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    kernels = {k.name: k for k in CountKernels()(step)["decode"]}

    def total(field: str, prefix: str) -> float:
        entries = [k for n, k in kernels.items() if n.startswith(prefix)]
        assert entries
        return sum(k.calls * Formula.parse(getattr(k, field)).at(work) for k in entries)

    weights = layers * (d * (h + 2 * hk) * dim + h * dim * d + 3 * d * f) + VOCAB * d
    assert total("operations", "linear_") == 2 * weights
    # weights once, activations beside them
    assert 2 * weights < total("read", "linear_") < 2 * weights + layers * 16 * (d + f) + 2 * d
    cached = layers * 2 * hk * dim * 2
    attention = total("read", "attention_")
    assert cached * CONTEXT < attention < cached * CONTEXT + layers * 2000
    assert total("operations", "attention_") >= layers * 4 * h * dim * CONTEXT
    # what is appended and the result
    assert total("written", "attention_") == cached + layers * h * dim * 2


def test_a_quantized_weight_is_read_in_its_own_size() -> None:
    _, step = lowered("llama", "bf16", quant="q4g32", quant_head="none")
    sizes = {p.name: p.shape for p in step.params if p.scheme}
    assert sizes
    packed = sum(rows * columns for rows, columns in sizes.values())
    quantized = [k for k in CountKernels()(step)["decode"] if "q4g32" in k.kind]
    weights = [Formula.parse(k.read).with_symbols({"T": Formula()}) for k in quantized]
    assert all(w.is_constant for w in weights)
    found = sum(k.calls * w.at(Workload.decode(1, 1)) for k, w in zip(quantized, weights, strict=True))
    assert found == packed


def test_layers_that_alternate_have_a_mean_per_block_and_windows_bound_what_is_read() -> None:
    _, step = lowered("gemma3_text", "f32")
    kernels = CountKernels()(step)["decode"]
    attention = [k for k in kernels if k.kind.endswith("attention")]
    assert len(attention) == 2 and sum(k.block_calls for k in attention) == pytest.approx(1)
    reads = {re.findall(r"\bC\d*", k.read)[0] for k in attention}
    assert reads == {"C", "C8"}
    windowed = next(k for k in attention if "C8" in k.read)
    near, far = (Formula.parse(windowed.read).at(Workload.decode(1, n)) for n in (8, 500))
    assert near == far


def test_experts_that_no_token_chose_are_not_read() -> None:
    _, step = lowered("mixtral", "f32")
    experts = [k for k in CountKernels()(step)["decode"] if k.kind == "experts"]
    assert experts
    one, many = (Formula.parse(experts[0].read).at(Workload.decode(n, 10)) for n in (1, 64))
    assert one < 0.6 * many  # 2 of 4 experts for a token, all of them for 64
