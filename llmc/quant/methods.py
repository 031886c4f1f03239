"""The calibrated methods by name, and a source model whose weights one of them has quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel
from llmc.quant.awq import AWQ
from llmc.quant.calibrate import Calibrated, Method, Nearest, calibrate
from llmc.quant.corpus import calibration_sequences
from llmc.quant.gptq import GPTQ
from llmc.quant.orthogonal import Rotation
from llmc.quant.overlay import OverlayWeights, QuantizedStore, StoredQuantizer
from llmc.quant.rotate import rotated
from llmc.quant.schemes import RTN, Scheme, rotates
from llmc.quant.shrink import PruneRule, RankRule
from llmc.quant.smooth import SmoothQuant
from llmc.quant.stored import stored_schemes
from llmc.quant.transform import Progress, Transformed, factor, prune

METHODS: dict[str, Callable[[], Method]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "awq+gptq": lambda: AWQ(rounding=GPTQ()),
    "smooth": SmoothQuant,
    "smooth+gptq": lambda: SmoothQuant(rounding=GPTQ()),
    # after the rotation of the whole model, see calibrated()
    "rotate": Nearest,
    "rotate+gptq": GPTQ,
}


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with.

    Attributes:
        method: a name of METHODS, or rtn: what is pruned or factored is then rounded when it is packed, and weights with
            outlier columns are rounded to the nearest beside those.
        text: text file; None: only for transforms that look at no activations.
        sequences, length: pieces of the text, and tokens of each (at most what the model takes).
        seed: of the choice of pieces, and of rotations.
        prune, svd: weight transforms before the quantization.
    """

    method: str
    text: Path | None
    sequences: int = 128
    length: int = 512
    seed: int = 0
    prune: PruneRule | None = None
    svd: RankRule | None = None

    def pieces(self, source: SourceModel) -> torch.Tensor:
        """The tokens, int64 [sequences, length].

        Raises:
            LlmcError: no tokenizer, or a text that is unreadable or too short.
        """
        if self.text is None:  # only to see which weights the layers multiply with
            return torch.randint(0, 64, (1, 64), generator=torch.Generator().manual_seed(self.seed))
        return calibration_sequences(
            source,
            self.text,
            sequences=self.sequences,
            length=min(self.length, source.max_seq_len),
            seed=self.seed,
        )


def calibrated(
    source: SourceModel,
    plan: Mapping[str, Scheme],
    calibration: Calibration,
    *,
    joined: Iterable[tuple[str, ...]] = (),
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> tuple[SourceModel, Calibrated]:
    """`source` with the weights of `plan` quantized: its weights are a QuantizedSource (llmc/quant/overlay.py).

    `joined`: weights that are packed as one, see calibrate(). A method that rotates needs a source whose embedding and
    output projection are two tensors (llmc.frontend.untie).

    Raises:
        LlmcError: unknown method, no weights, text too short, a model that cannot be rotated.
    """
    if calibration.method not in (RTN, *METHODS):
        raise LlmcError(
            "unknown-quant-method",
            f"A quantization method must be one of rtn, {', '.join(METHODS)}; found {calibration.method!r}.",
            hint="Use gptq, for instance.",
        )
    if source.weights is None:
        raise LlmcError(
            "no-weights", f"{source.name} was opened without weights; they are required to calibrate."
        )
    prepared = _transformed(source, calibration, progress, folder)
    source, sequences = prepared.source, prepared.sequences
    assert source.weights is not None
    if calibration.method == RTN and not any(scheme.outlier_share for scheme in plan.values()):
        weights, store = OverlayWeights(source.weights, {}), QuantizedStore(folder)
        found = Calibrated(weights, StoredQuantizer(store), (), {})
    else:
        method = Nearest(search=False) if calibration.method == RTN else METHODS[calibration.method]()
        found = calibrate(source, plan, sequences, method, joined=joined, progress=progress, folder=folder)
    found = replace(
        found,
        notes=(*prepared.notes, *found.notes),
        errors={**prepared.errors, **found.errors},
        stream=prepared.stream,
    )
    return replace(source, weights=found.weights), found


@dataclass(frozen=True)
class _Prepared:
    """A model that is ready to be quantized, and what its preparation has to say."""

    source: SourceModel
    sequences: torch.Tensor
    stream: Rotation | None
    notes: tuple[str, ...]
    errors: dict[str, float]


def _transformed(
    source: SourceModel, calibration: Calibration, progress: Progress | None, folder: Path | None
) -> _Prepared:
    """Rotated, then pruned or factored, as far as it is asked for."""
    assert source.weights is not None
    transforms = rotates(calibration.method) or calibration.prune or calibration.svd
    if transforms and stored_schemes(source.weights):
        raise LlmcError(
            "already-quantized",
            f"The weights of {source.name} are quantized already; rotation, --prune and --svd need floating-point ones.",
            hint="Use the checkpoint that it was quantized from.",
        )
    sequences = calibration.pieces(source)
    notes: tuple[str, ...] = ()
    errors: dict[str, float] = {}
    stream: Rotation | None = None
    if rotates(calibration.method):
        source, stream, notes = rotated(source, sequences, seed=calibration.seed)
    made: Transformed | None = None
    if calibration.svd is not None:
        made = factor(source, sequences, calibration.svd, progress=progress, folder=folder)
    elif calibration.prune is not None:
        made = prune(source, sequences, calibration.prune, progress=progress, folder=folder)
    if made is not None:
        source, errors, notes = made.source, made.errors, (*notes, *made.notes)
    return _Prepared(source, sequences, stream, notes, errors)
