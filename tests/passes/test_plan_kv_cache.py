"""PlanKVCache: which layers share a page table, and how long pages live."""

from __future__ import annotations

import pytest

from llmc.errors import LlmcError
from llmc.kv_plan import KVKind
from llmc.ops import AttentionAttrs
from llmc.passes.plan_kv_cache import PlanKVCache
from tests.passes.graphs import attention_model


def plan(model, **options):
    return PlanKVCache(**{"page_size": 16, "kv_dtype": None, "max_seq_len": 4096, **options})(model)


def test_layers_of_one_shape_are_one_group():
    result = plan(attention_model(layers=3))
    assert len(result.groups) == 1
    group = result.groups[0]
    assert (group.kind, group.layers, group.kv_heads, group.key_dim) == (KVKind.FULL, (0, 1, 2), 2, 16)
    assert group.k_shape(5, 16) == (5, 3, 2, 16, 16)
    assert result.locate(2) == (0, 2)


def test_alternating_windows_are_two_groups():
    model = attention_model(
        layers=4, attrs=lambda i: AttentionAttrs(layer=i, scale=1.0, window=0 if i % 2 else 64)
    )
    result = plan(model)
    assert [(g.kind, g.layers, g.window) for g in result.groups] == [
        (KVKind.SLIDING_WINDOW, (0, 2), 64),
        (KVKind.FULL, (1, 3), 0),
    ]
    assert result.locate(3) == (1, 1)


def test_a_window_that_no_sequence_outgrows_is_a_full_cache():
    model = attention_model(attrs=lambda i: AttentionAttrs(layer=i, scale=1.0, window=64))
    assert [g.kind for g in plan(model, max_seq_len=64).groups] == [KVKind.FULL]


def test_chunked_layers():
    model = attention_model(attrs=lambda i: AttentionAttrs(layer=i, scale=1.0, chunk=32))
    assert [(g.kind, g.window) for g in plan(model).groups] == [(KVKind.CHUNKED, 32)]


def test_layers_that_read_another_layers_cache_own_none():
    result = plan(attention_model(layers=3, share={2: 0}))
    assert result.groups[0].layers == (0, 1)
    assert result.shared == ((2, 0),)
    assert result.locate(2) == result.locate(0) == (0, 0)


def test_a_reader_with_a_longer_past_keeps_the_owners_pages():
    model = attention_model(
        layers=2, share={1: 0}, attrs=lambda i: AttentionAttrs(layer=i, scale=1.0, window=0 if i else 8)
    )
    assert [(g.kind, g.layers) for g in plan(model).groups] == [(KVKind.FULL, (0,))]


def test_kv_dtype_overrides_the_models():
    assert plan(attention_model(), kv_dtype="float16").groups[0].dtype == "float16"
    assert plan(attention_model(), kv_dtype="float16").bytes_per_token() == 2 * 2 * (16 + 16) * 2


def test_pages_of_codes_count_their_scales():
    of = plan(attention_model(), kv_dtype="int8")
    assert of.bytes_per_token() == 2 * 2 * (16 + 2 + 16 + 2)
    group = of.groups[0]
    assert group.k_shape(5, 16) == (5, 2, 2, 16 * 18) and group.storage_dtype == "uint8"
    assert of.bytes_per_token() == plan(attention_model(), kv_dtype="float8_e4m3fn").bytes_per_token()
    with pytest.raises(LlmcError, match="must be f32, f16, bf16, int8 or fp8"):
        plan(attention_model(), kv_dtype="int4")
