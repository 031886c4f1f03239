"""The weights of a quantized checkpoint under the parameter names of the model: dequantized, or as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmc.frontend.weights import CheckpointWeights
from llmc.quant.readers.base import QuantizedFiles
from llmc.quant.schemes import Scheme
from llmc.quant.weight import FIELDS, QuantizedWeight


class QuantizedCheckpoint(CheckpointWeights):
    """A WeightSource (llmc.quant.overlay.QuantizedSource) whose load() gives quantized weights in float32.

    Args:
        files: the checkpoint.
        model: the model on the meta device.

    Raises:
        LlmcError: as CheckpointWeights.
    """

    def __init__(self, files: QuantizedFiles, model: PreTrainedModel) -> None:
        # they keep their weights as [in, out]; all formats store [out, in]
        turned = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)]
        files.transpose(
            key for key in files.quantized_keys() if any(f".{n}".endswith(f".{key}") for n in turned)
        )
        self._quantized_files = files
        super().__init__(files, model)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a weight whose stored tensors all have the same one, without reading it; else None."""
        recipe = self._recipes[self._stored(name)]
        entries = [self._quantized_files.entry(key) for key in recipe.all_keys()]
        schemes = {e.scheme if e is not None else None for e in entries}
        return schemes.pop() if len(schemes) == 1 else None

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The weight as stored, [N, K] or [E, N, K]; None if it is not quantized.

        Where the model's parameter is made of several stored tensors (experts, fused projections), codes and scales are
        put together in the same way. None too if that does not give the same values, as for parts joined along K.
        """
        scheme = self.scheme_of(name)
        if scheme is None:
            return None
        stored = self._stored(name)
        recipe = self._recipes[stored]
        keys = recipe.all_keys()
        parts = {key: self._quantized_files.quantized(key) for key in keys}
        if recipe.converter is None:
            return parts[keys[0]]
        fields: dict[str, Any] = {}
        for field in FIELDS:
            arrays = {key: getattr(part, field) for key, part in parts.items()}
            if any(a is None for a in arrays.values()):
                continue
            try:
                made = recipe.run({k: torch.from_numpy(a) for k, a in arrays.items()}, self._model)
            except (RuntimeError, ValueError, IndexError):
                return None
            fields[field] = np.ascontiguousarray(made[stored].numpy())
        codes, scales = fields["codes"], fields["scales"]
        if codes.shape[:-1] != scales.shape[:-1]:
            return None
        size = scheme.group_size or codes.shape[-1]
        if scales.shape[-1] != -(-codes.shape[-1] // size):
            return None
        # equal schemes have equal orders
        order = parts[keys[0]].order
        if order is not None:
            order = np.broadcast_to(order, (*codes.shape[:-2], codes.shape[-1]))
        weight = QuantizedWeight(scheme, **fields, order=order)
        return weight if torch.equal(torch.from_numpy(weight.dequantize()), self.load(name)) else None
