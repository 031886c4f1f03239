"""Comparing an artifact's numbers with the source model's: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# a float32 artifact: largest absolute error of a logit, times the scale of the logits where that exceeds 1
EXACT_TOLERANCE = 2e-4
# a float32 artifact: relative error of a layer's output above which the layer is wrong
EXACT_LAYER_TOLERANCE = 2e-5
# Otherwise the yardstick is the error that the source model itself has in that dtype. Correct kernels come out at
# 0.7 to 1.2 times it, since they round at the same places; a defect that matters adds to it.
NOISE_FACTOR = 2.0
# the worst row may be this much worse than the noise of its group
ROW_FACTOR = 6.0
# share of rows that may be ruined by a router that picks another expert because of rounding
ROUTED_OUTLIERS = 0.25

EPSILON = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    # of cache pages; int8 has even steps below the largest element of a key or value
    "int8": 2.0**-7,
    "float8_e4m3fn": 2.0**-4,
}
# part of the dtype's epsilon that is allowed even if the source happens to have no rounding error at all
_FLOOR = 0.125


@dataclass(frozen=True)
class Finding:
    """One way in which the logits are wrong."""

    rows: str  # which rows: prefill, decode, ...
    error: float
    limit: float
    what: str  # of what the error is

    def text(self) -> str:
        return f"{self.what} of the {self.rows} rows is {self.error:.3g}, allowed {self.limit:.3g}"


@dataclass(frozen=True)
class LogitsComparison:
    """Errors of logits [n, V] against the float32 source; see QualityReport for the fields of that name."""

    max_abs: Mapping[str, float]  # by group of rows
    relative_error: float
    reference_noise: float | None
    tolerance: float
    kl_mean: float
    top1_agreement: float
    findings: tuple[Finding, ...]


def row_rms(x: np.ndarray) -> np.ndarray:
    """Root mean square of each row, f64 [n]."""
    wide = x.astype(np.float64)
    return np.sqrt((wide * wide).mean(axis=-1))


def centred(x: np.ndarray) -> np.ndarray:
    """Rows minus their mean: softmax does not see a constant added to all logits."""
    return x - x.mean(axis=-1, keepdims=True)


def group_rms(rows: np.ndarray, outliers: float = 0.0) -> float:
    """Root mean square over rows of errors, leaving out the given share of the worst ones."""
    keep = np.sort(rows)[: max(1, len(rows) - int(len(rows) * outliers))]
    return float(np.sqrt((keep * keep).mean()))


def compare_logits(
    artifact: np.ndarray,
    exact: np.ndarray,
    rounded: np.ndarray | None,
    groups: Mapping[str, np.ndarray],
    *,
    dtype: str,
    routed: bool = False,
) -> LogitsComparison:
    """Compare an artifact's logits with the source model's.

    Args:
        artifact: f32 [n, V].
        exact: of the source in float32, [n, V].
        rounded: of the source in the artifact's dtype; None for a float32 artifact, which must agree closely.
        groups: name -> indices of rows that are judged together (prefill, decode, past the window, ...).
        dtype: the coarser of the artifact's dtype and its cache's, for the floor.
        routed: the model picks experts; a few rows may be off because rounding decided a tie.
    """
    finite = np.isfinite(artifact).all(axis=-1)
    if not finite.all():
        return _not_finite(artifact, finite, groups)
    centre = centred(exact)
    scale = group_rms(row_rms(centre)) or 1.0
    difference = artifact - exact
    errors = row_rms(centred(difference)) / scale
    max_abs = {name: float(np.abs(difference[rows]).max()) for name, rows in groups.items()}
    outliers = ROUTED_OUTLIERS if routed else 0.0
    findings: list[Finding] = []
    noise: float | None = None
    if rounded is None:
        tolerance = EXACT_TOLERANCE * max(1.0, float(np.abs(exact).max()))
        for name, error in max_abs.items():
            if not error <= tolerance:
                findings.append(Finding(name, error, tolerance, "the largest error"))
    else:
        own = row_rms(centred(rounded - exact)) / scale
        noise = group_rms(own, outliers)
        floor = _FLOOR * EPSILON[dtype]
        tolerance = NOISE_FACTOR * noise + floor
        for name, rows in groups.items():
            # a group of few rows may by chance have little noise of its own
            base = max(group_rms(own[rows], outliers), 0.5 * noise)
            error, limit = group_rms(errors[rows], outliers), NOISE_FACTOR * base + floor
            if not error <= limit:
                findings.append(Finding(name, error, limit, "the relative error"))
            worst, limit = float(errors[rows].max()), ROW_FACTOR * float(own[rows].max(initial=base)) + floor
            if not routed and not worst <= limit:
                findings.append(Finding(name, worst, limit, "the worst row's relative error"))
    return LogitsComparison(
        max_abs,
        group_rms(errors, outliers),
        noise,
        tolerance,
        *_distribution(artifact, exact),
        tuple(findings),
    )


def _not_finite(
    artifact: np.ndarray, finite: np.ndarray, groups: Mapping[str, np.ndarray]
) -> LogitsComparison:
    findings = tuple(
        Finding(
            name, float((~np.isfinite(artifact[rows])).sum()), 0.0, "the number of NaN or infinite logits"
        )
        for name, rows in groups.items()
        if not finite[rows].all()
    )
    nan = float("nan")
    return LogitsComparison(dict.fromkeys(groups, nan), nan, None, nan, nan, nan, findings)


def distance(logits: np.ndarray, exact: np.ndarray) -> tuple[float, float, float]:
    """(relative error, mean KL divergence in nats, share of equal argmax) of logits [n, V] from the exact ones."""
    scale = group_rms(row_rms(centred(exact))) or 1.0
    error = group_rms(row_rms(centred(logits - exact))) / scale
    return (error, *_distribution(logits, exact))


def _distribution(artifact: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Mean KL divergence (nats) of the artifact's next-token distribution from the source's; share of equal argmax."""
    kl = []
    for a, e in zip(artifact, exact, strict=True):  # row by row: a vocabulary can be large
        log_a, log_e = _log_softmax(a), _log_softmax(e)
        kl.append(float((np.exp(log_e) * (log_e - log_a)).sum()))
    return float(np.mean(kl)), float((artifact.argmax(-1) == exact.argmax(-1)).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64) - x.max()
    out: np.ndarray = wide - np.log(np.exp(wide).sum())
    return out


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from the float32 source's.

    Attributes:
        path: the layer.
        error: root mean square of the difference over that of the output.
        noise: the same for the source run in the artifact's dtype.
        limit: what `error` may be.
    """

    path: str
    error: float
    noise: float
    limit: float

    @property
    def diverges(self) -> bool:
        return not self.error <= self.limit  # NaN diverges


def layer_errors(
    paths: Sequence[str],
    artifact: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    rounded: Mapping[str, np.ndarray] | None,
    *,
    dtype: str,
    routed: bool = False,
) -> list[LayerError]:
    """Errors of each layer's output [n, d], in the order of `paths`; arguments as in compare_logits."""
    out = []
    outliers = ROUTED_OUTLIERS if routed else 0.0
    for path in paths:
        reference = exact[path]
        scale = group_rms(row_rms(reference)) or 1.0

        def relative(x: np.ndarray, reference: np.ndarray = reference, scale: float = scale) -> float:
            rows = row_rms(x - reference) / scale
            return group_rms(np.where(np.isfinite(rows), rows, np.inf), outliers)

        error = relative(artifact[path])
        if rounded is None:
            out.append(LayerError(path, error, 0.0, EXACT_LAYER_TOLERANCE))
        else:
            noise = relative(rounded[path])
            out.append(LayerError(path, error, noise, NOISE_FACTOR * noise + _FLOOR * EPSILON[dtype]))
    return out


def first_divergence(errors: Sequence[LayerError]) -> LayerError | None:
    """The first layer whose output is off; what follows it inherits the error."""
    return next((e for e in errors if e.diverges), None)
