"""llmc's entries in transformers' registries for attention, masks and experts, and switching a model to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.modeling_utils import AttentionInterface

from llmc.errors import LlmcError
from llmc.frontend import torch_ops  # noqa: F401  (defines torch.ops.llmc)
from llmc.frontend.masks import MaskKind, classify_mask

NAME = "llmc"
_paths: dict[int, str] = {}  # of the modules of the model that is being traced, for messages

# tensors that attention functions get for other back ends and that do not change what is computed
_IGNORED_TENSORS = frozenset({"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"})


def mask(
    batch_size: int,
    q_length: Any,
    kv_length: Any,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    **_: Any,
) -> torch.Tensor:
    """AttentionMaskInterface entry: the eager mask [1, 1, s, s] as one operator that carries what it means.

    A padding mask that the model makes up itself goes along; it has to turn out to be all ones.
    """
    if q_offset != 0 or kv_offset != 0:
        raise LlmcError("mask-not-understood", "The model builds its mask from a cache.")
    kind = classify_mask(mask_function)
    like = torch.empty((), dtype=dtype, device=device)
    return torch.ops.llmc.mask(like, attention_mask, q_length, kind.causal, kind.window, kind.chunk)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """AttentionInterface entry: one llmc::attention per block; q [1,h,s,d], k and v [1,hk,s,d] -> [1,s,h,dv]."""
    for name, extra in kwargs.items():
        if isinstance(extra, torch.Tensor) and name not in _IGNORED_TENSORS:
            raise LlmcError(
                "attention-argument-unknown",
                f"{_paths.get(id(module)) or 'The model'} ({type(module).__name__}) passes the tensor {name!r} to its "
                "attention, and llmc knows no attention that takes one.",
                hint="Sparse attention over chosen tokens is not supported yet." if name == "indices" else "",
                context={"module": _paths.get(id(module), "")},
            )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    out = torch.ops.llmc.attention(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        float(softcap or 0.0),
        is_causal,
        int(sliding_window or 0),
    )
    return out, None


def experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """ExpertsInterface entry: tokens [n, d], top_k_index [n, k], top_k_weights [n, k] -> [n, d].

    Only the per-expert linear layers are opaque; the module's own gate, activation and norm stay ordinary operations.
    """
    tokens, per_token = hidden_states.shape[0], top_k_index.shape[-1]
    ids = top_k_index.reshape(-1)
    x = hidden_states.repeat_interleave(per_token, dim=0)
    first = "gate_up_proj" if self.has_gate else "up_proj"

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        return torch.ops.llmc.expert_linear(x, ids, getattr(self, name), bias, self.is_transposed)

    x = linear(x, first)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = linear(x, "down_proj")
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1, 1)
    return x.view(tokens, per_token, -1).sum(dim=1).to(hidden_states.dtype)


def register() -> None:
    """Enter llmc into transformers' registries; harmless when repeated."""
    AttentionInterface.register(NAME, attention)
    masking_utils.AttentionMaskInterface.register(NAME, mask)
    ExpertsInterface.register(NAME, experts)
    ALL_EXPERTS_FUNCTIONS[NAME] = experts


@contextmanager
def routed_through_llmc(model: torch.nn.Module) -> Iterator[None]:
    """Switch every config inside `model` to llmc's attention, masks and experts; restore them afterwards.

    Also tells transformers that position_ids hold one sequence: under tracing it cannot look at them and would
    otherwise overlay every mask with a test for packed sequences.
    """
    register()
    configs: dict[int, Any] = {}
    for module in model.modules():
        for config in _with_sub_configs(getattr(module, "config", None)):
            configs[id(config)] = config
    saved = [
        (c, name, getattr(c, name))
        for c in configs.values()
        for name in ("_attn_implementation_internal", "_experts_implementation_internal")
        if hasattr(c, name)
    ]
    find_packed = masking_utils.find_packed_sequence_indices
    _paths.update((id(module), path) for path, module in model.named_modules())
    try:
        for config, name, _ in saved:
            setattr(config, name, NAME)
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
        yield
    finally:
        _paths.clear()
        masking_utils.find_packed_sequence_indices = find_packed
        for config, name, value in saved:
            setattr(config, name, value)


def _with_sub_configs(config: Any) -> Iterator[Any]:
    if config is None or not hasattr(config, "_attn_implementation_internal"):
        return
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        yield from _with_sub_configs(getattr(config, name, None))


__all__ = ["NAME", "MaskKind", "attention", "experts", "mask", "register", "routed_through_llmc"]
