"""Checkpoints that are quantized already, read as they are: one module per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import TensorFiles
from llmc.quant.readers.awq import read_awq
from llmc.quant.readers.base import Config, QuantizedFiles
from llmc.quant.readers.bitsandbytes import read_bitsandbytes
from llmc.quant.readers.compressed_tensors import read_compressed_tensors
from llmc.quant.readers.fp8 import read_fp8
from llmc.quant.readers.gptq import read_gptq
from llmc.quant.readers.mxfp4 import read_mxfp4

READERS: dict[str, Callable[[Config, TensorFiles], QuantizedFiles]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "bitsandbytes": read_bitsandbytes,
    "mxfp4": read_mxfp4,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
}


def open_quantized(folder: Path, config: Mapping[str, object], files: TensorFiles) -> TensorFiles:
    """`files` as they are, or as QuantizedFiles if config.json has a quantization_config.

    Raises:
        LlmcError: the method or one of its options is not supported; the field is named.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return files
    where = f"{folder / 'config.json'}: quantization_config"
    method = found.get("quant_method")
    # bitsandbytes has not always written its name
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in READERS:
        raise LlmcError(
            "quantization-config",
            f"{where}.quant_method is {method!r}; llmc reads {', '.join(READERS)}.",
            hint="Use the unquantized checkpoint and llmc's own --quant, or another quantized one.",
        )
    return READERS[str(method)](Config(found, where), files)
