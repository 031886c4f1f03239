"""The calibrated methods by name, and a source model whose weights one of them has quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel
from llmc.quant.awq import AWQ
from llmc.quant.calibrate import Calibrated, Method, calibrate
from llmc.quant.corpus import calibration_sequences
from llmc.quant.gptq import GPTQ
from llmc.quant.schemes import Scheme
from llmc.quant.smooth import SmoothQuant

METHODS: dict[str, Callable[[], Method]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "awq+gptq": lambda: AWQ(rounding=GPTQ()),
    "smooth": SmoothQuant,
    "smooth+gptq": lambda: SmoothQuant(rounding=GPTQ()),
}


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with.

    Attributes:
        method: a name of METHODS.
        text: text file.
        sequences, length: pieces of the text, and tokens of each (at most what the model takes).
        seed: of the choice of pieces.
    """

    method: str
    text: Path
    sequences: int = 128
    length: int = 512
    seed: int = 0


def calibrated(
    source: SourceModel,
    plan: Mapping[str, Scheme],
    calibration: Calibration,
    *,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> tuple[SourceModel, Calibrated]:
    """`source` with the weights of `plan` quantized: its weights are a QuantizedSource (llmc/quant/overlay.py).

    Raises:
        LlmcError: unknown method, no weights, text too short.
    """
    if calibration.method not in METHODS:
        raise LlmcError(
            "unknown-quant-method",
            f"A quantization method must be one of rtn, {', '.join(METHODS)}; found {calibration.method!r}.",
            hint="Use gptq, for instance.",
        )
    if source.weights is None:
        raise LlmcError(
            "no-weights", f"{source.name} was opened without weights; they are required to calibrate."
        )
    sequences = calibration_sequences(
        source,
        calibration.text,
        sequences=calibration.sequences,
        length=min(calibration.length, source.max_seq_len),
        seed=calibration.seed,
    )
    method = METHODS[calibration.method]()
    found = calibrate(source, plan, sequences, method, progress=progress, folder=folder)
    return replace(source, weights=found.weights), found
