"""WeightSources: the weights of a model by its own parameter names, one tensor at a time.

A checkpoint's keys are rarely the module's: prefixes differ, old names linger, experts are stored one by one.
transformers describes the way from one to the other as renamings and converters; the same descriptions are run
here, but for one parameter at a time and first on meta tensors, which tells names and shapes without reading data.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmc.errors import LlmcError
from llmc.frontend.graph import ParamInfo
from llmc.frontend.meta import compute_buffers, owner_of, persistent_buffers
from llmc.frontend.tensor_files import StoredTensor, TensorFiles


@dataclass
class _Recipe:
    """How to make parameters out of stored tensors: keys by source pattern, and the converter (None: as it is)."""

    name: str
    converter: WeightConverter | None = None
    keys: dict[str, list[str]] = field(default_factory=dict)

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    def run(self, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Parameters by name, from stored tensors by key."""
        if self.converter is None:
            return {self.name: tensors[self.all_keys()[0]]}
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys:
                converter.add_tensor(self.name, key, pattern, tensors[key])
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class CheckpointWeights:
    """Weights in files, under the parameter names of a transformers model.

    Args:
        files: the checkpoint.
        model: the model on the meta device; weights that the config ties but the checkpoint stores with different
            values are untied in it, as from_pretrained does.

    Attributes:
        unused: keys of the checkpoint that the model has no place for.

    Raises:
        LlmcError: a tensor is missing or has another shape than the model's.
    """

    def __init__(self, files: TensorFiles, model: PreTrainedModel) -> None:
        self._files = files
        self._model = model
        self._index = files.index()
        state = model.state_dict(keep_vars=True)
        recipes, unused = _match(self._index, model, state)
        self.unused = tuple(unused)
        self._recipes: dict[str, _Recipe] = {}
        self._infos: dict[str, ParamInfo] = {}
        for recipe in recipes:
            self._plan(recipe, state)
        self._alias: dict[str, str] = {}
        self._tie(state)
        self._names = tuple(self._require_all())

    def names(self) -> tuple[str, ...]:
        return self._names

    def info(self, name: str) -> ParamInfo:
        info = self._infos[self._stored(name)]
        return ParamInfo(name, info.shape, info.dtype)

    def load(self, name: str) -> torch.Tensor:
        stored = self._stored(name)
        tensor = self._read(stored)
        _check_finite(name, tensor, self._where(stored))
        return tensor

    def _stored(self, name: str) -> str:
        stored = self._alias.get(name, name)
        if stored not in self._recipes:
            raise LlmcError("weight-unknown", f"The checkpoint has no weight for {name!r}.")
        return stored

    def _read(self, stored: str) -> torch.Tensor:
        recipe = self._recipes[stored]
        return recipe.run(self._files.read(recipe.all_keys()), self._model)[stored]

    def _where(self, stored: str) -> str:
        keys = self._recipes[stored].all_keys()
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return f"{self._index[keys[0]].file} (tensor {keys[0]!r}{more})"

    def _plan(self, recipe: _Recipe, state: Mapping[str, torch.Tensor]) -> None:
        """Learn which parameters a recipe makes, with which shapes, by running it on meta tensors."""
        meta = {k: _meta(self._index[k]) for k in recipe.all_keys()}
        try:
            made = recipe.run(meta, self._model)
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as e:
            key = recipe.all_keys()[0]
            raise LlmcError(
                "weight-shape",
                f"The weights for {recipe.name} do not fit together: {self._index[key].file} holds"
                f" {len(meta)} tensors such as {key!r} of shape {_dims(self._index[key].shape)}"
                f" ({str(e).splitlines()[0] if str(e) else type(e).__name__}).",
                hint="config.json and the weights are of different models, or the download is incomplete.",
            ) from None
        for name, tensor in made.items():
            if name not in state:
                continue
            self._recipes[name] = recipe
            if tensor.shape != state[name].shape:
                raise LlmcError(
                    "weight-shape",
                    f"{self._where(name)} has shape {_dims(tensor.shape)}; config.json asks for"
                    f" {_dims(state[name].shape)} ({name}).",
                    hint="config.json and the weights are of different models.",
                )
            self._infos[name] = ParamInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _tie(self, state: Mapping[str, torch.Tensor]) -> None:
        """Tied weights are stored once under any of their names; stored twice and different, they are not tied."""
        groups: dict[int, list[str]] = {}
        for name, tensor in state.items():
            groups.setdefault(id(tensor), []).append(name)
        for names in groups.values():
            present = [n for n in names if n in self._recipes]
            if len(names) == 1 or not present:
                continue
            first = names[0] if names[0] in self._recipes else present[0]
            for name in names:
                if name != first and name in present and not self._same(name, first):
                    owner, leaf = owner_of(self._model, name)
                    param = state[name]
                    owner._parameters[leaf] = torch.nn.Parameter(torch.empty_like(param), requires_grad=False)
                elif name != first:
                    self._alias[name] = first

    def _same(self, a: str, b: str) -> bool:
        x, y = self._read(a), self._read(b)
        return x.data_ptr() == y.data_ptr() or (x.dtype == y.dtype and torch.equal(x, y))

    def _require_all(self) -> list[str]:
        """Names of the model's parameters and persistent buffers; raises if the checkpoint lacks one."""
        ignorable = [re.compile(p) for p in self._model._keys_to_ignore_on_load_missing or ()]
        names, missing, computed = [], [], []
        buffers = persistent_buffers(self._model)
        for name in [*dict(self._model.named_parameters()), *buffers]:
            if self._alias.get(name, name) in self._recipes:
                names.append(name)
            elif name in buffers and any(p.search(name) for p in ignorable):
                computed.append(name)
            else:
                missing.append(name)
        if missing:
            near = _nearest(missing[0], self.unused)
            raise LlmcError(
                "weight-missing",
                f"The checkpoint lacks {len(missing)} of the {len(names) + len(missing)} weights that config.json asks"
                f" for: {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
                + (f" (it has unused tensors such as {near!r})." if near else "."),
                hint="Download the checkpoint again, or check that config.json belongs to it.",
            )
        if computed:
            compute_buffers(self._model, computed)
        return names


class ModuleWeights:
    """The weights of a module in memory: parameters and persistent buffers, tied ones once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self._tensors = dict(tensors)
        self._where = where

    @staticmethod
    def of(module: torch.nn.Module) -> ModuleWeights:
        return ModuleWeights(
            {**dict(module.named_parameters()), **persistent_buffers(module)}, type(module).__name__
        )

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> ParamInfo:
        tensor = self._tensors[name]
        return ParamInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def load(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise LlmcError("weight-unknown", f"{self._where} has no weight {name!r}.")
        tensor = self._tensors[name]
        if tensor.device.type == "meta":
            raise LlmcError(
                "weight-missing",
                f"The weight {name} of {self._where} is on the meta device and has no values.",
                hint="Load the weights first, or compile with meta_weights=True for sizes only.",
            )
        tensor = tensor.detach().cpu()
        _check_finite(name, tensor, self._where)
        return tensor


def _match(
    index: Mapping[str, StoredTensor], model: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> tuple[list[_Recipe], list[str]]:
    """Assign every stored key to a recipe, or to the list of unused keys."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    converter_of = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix
    recipes: dict[str, _Recipe] = {}
    unused = []
    # the order is part of the meaning: lists of experts are merged in it
    for key in sorted(index, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unused.append(key)
        elif pattern is None:
            recipes[name] = _Recipe(name, None, {key: [key]})
        else:
            recipe = recipes.setdefault(name, _Recipe(name, converter_of[pattern]))
            recipe.keys.setdefault(pattern, []).append(key)
    return list(recipes.values()), unused


def _meta(stored: StoredTensor) -> torch.Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # both become NaN if one element is
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise LlmcError(
            "weight-not-finite",
            f"The weight {name} in {where} has {bad} of {tensor.numel()} values that are NaN or infinite.",
            hint="The checkpoint is damaged or its training diverged; use another one.",
        )


def _nearest(name: str, keys: tuple[str, ...]) -> str:
    tail = name.split(".")[-2:]
    return next((k for k in keys if k.split(".")[-2:] == tail), keys[0] if keys else "")


def _dims(shape: tuple[int, ...] | torch.Size) -> str:
    return "×".join(str(int(s)) for s in shape) or "scalar"
