"""Every kernel compiles for processors that this machine is not, and uses their vector instructions."""

import pytest

from llmc.schedules.attention import AttentionConfig, attention_decode, attention_prefill, kv_append
from llmc.schedules.experts import ExpertConfig, expert_linear
from llmc.schedules.gather import EmbeddingConfig, embedding
from llmc.schedules.layout import linear_layout
from llmc.schedules.linear import LinearConfig, linear
from llmc.targets.cpu.backend import capabilities


@pytest.mark.parametrize(
    ("preset", "instruction"),
    [("aarch64", "fmla"), ("x86-64-v4", "vfmadd"), ("x86-64-v4-bf16", "vdpbf16ps")],
)
def test_kernels_compile(preset, instruction, tools):
    caps = capabilities(preset)
    dtype = "bfloat16"
    attention = AttentionConfig(8, 2, 64, 64, dtype, dtype, 32, 2, 0.125, window=100, has_sinks=True)
    layout = linear_layout(dtype, caps)
    funcs = {
        "linear": linear(LinearConfig(128, 64, dtype, dtype, "float32", True, 1), caps),
        "experts": expert_linear(ExpertConfig(4, 64, 64, dtype, dtype, dtype), caps),
        "embedding": embedding(EmbeddingConfig(100, 64, dtype, "int32", 1, layout), caps),
        "append": kv_append(attention, caps),
        "prefill": attention_prefill(attention, caps),
        "decode": attention_decode(attention, caps),
    }
    text = tools.assembly(caps, **funcs)
    assert text.count(instruction) > 50
    assert "zmm" not in text or caps.vector_bytes == 64
