"""The structure of a model without its weights: parameters on the meta device, computed buffers real."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def from_config(config: Any, dtype: str, *, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of a transformers config, in eval mode, without allocating its weights.

    Parameters and persistent buffers are on the meta device in `dtype` (tied ones are one object; those that
    the architecture keeps in float32 are float32). Non-persistent buffers (rotary frequencies, embedding scales)
    are computed, as ``from_pretrained`` would.

    Args:
        config: a PreTrainedConfig; copied.
        dtype: TVM's name of a floating dtype.
        cls: the model class; None = what AutoModelForCausalLM picks.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if cls is None:
            model = AutoModelForCausalLM.from_config(
                config, dtype=TORCH_DTYPES[dtype], trust_remote_code=False
            )
        else:
            model = cls._from_config(config, dtype=TORCH_DTYPES[dtype])
    _keep_in_float32(model, TORCH_DTYPES[dtype])
    compute_buffers(model)
    model.eval()
    return model


def compute_buffers(model: PreTrainedModel, persistent: Iterable[str] = ()) -> None:
    """Give every non-persistent buffer (and those named in `persistent`) the value that the architecture defines.

    transformers computes such buffers in ``_init_weights``, whose writes skip tensors that are flagged as
    initialised. With everything else flagged, only the buffers are written and no weight is allocated.
    """
    wanted = set(persistent)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, leaf = owner_of(model, name)
        if leaf in owner._parameters or (
            leaf not in owner._non_persistent_buffers_set and name not in wanted
        ):
            tensor._is_hf_initialized = True
        elif tensor.device.type == "meta":
            owner._buffers[leaf] = torch.empty_like(tensor, device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def skeleton(module: torch.nn.Module, dtype: str | None = None) -> torch.nn.Module:
    """A copy of `module` in eval mode whose parameters are on the meta device; buffers are copied with their values.

    Args:
        dtype: if given, floating parameters and buffers become this dtype.
    """
    memo: dict[int, Any] = {}
    for param in module.parameters():
        empty = torch.empty_like(param, device="meta")
        if dtype is not None and param.is_floating_point():
            empty = empty.to(TORCH_DTYPES[dtype])
        memo[id(param)] = torch.nn.Parameter(empty, requires_grad=False)
    clone = copy.deepcopy(module, memo).eval()
    if dtype is not None:
        _cast_buffers(clone, _dtype_name(module), dtype)
        if isinstance(clone, PreTrainedModel):
            _keep_in_float32(clone, TORCH_DTYPES[dtype])
    return clone


def _cast_buffers(module: torch.nn.Module, stored: str, dtype: str) -> None:
    """Floating buffers in `dtype`; those that transformers computes (rotary frequencies stay float32) as it would."""
    computed: dict[str, torch.Tensor] = {}
    if isinstance(module, PreTrainedModel):
        before = dict(from_config(module.config, stored, cls=type(module)).named_buffers())
        after = dict(from_config(module.config, dtype, cls=type(module)).named_buffers())
        for name, buffer in module.named_buffers():
            old = before.get(name)
            # not the value that the config gives: somebody has set it
            known = old is not None and old.device.type != "meta" and old.dtype == buffer.dtype
            if known and torch.equal(old, buffer.cpu()):
                computed[name] = after[name]
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if buffer.is_floating_point():
            owner, leaf = owner_of(module, name)
            owner._buffers[leaf] = computed[name] if name in computed else buffer.to(TORCH_DTYPES[dtype])


def _dtype_name(module: torch.nn.Module) -> str:
    found = (str(p.dtype).removeprefix("torch.") for p in module.parameters())
    return next((name for name in found if name in TORCH_DTYPES), "float32")


def owner_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds the parameter or buffer `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dict, by name."""
    out = {}
    for name, buffer in model.named_buffers():
        owner, leaf = owner_of(model, name)
        if leaf not in owner._non_persistent_buffers_set:
            out[name] = buffer
    return out


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Some architectures list weights that stay in float32 whatever the model's dtype (router biases and the like)."""
    plan = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(dtype)]
    if not plan:
        return
    done: dict[int, torch.nn.Parameter] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(p.search(name) for p in plan) or not tensor.is_floating_point():
            continue
        owner, leaf = owner_of(model, name)
        if leaf in owner._parameters:
            # tied weights must stay one object
            new = done.setdefault(
                id(tensor), torch.nn.Parameter(tensor.detach().float(), requires_grad=False)
            )
            owner._parameters[leaf] = new
        else:
            owner._buffers[leaf] = tensor.float()
