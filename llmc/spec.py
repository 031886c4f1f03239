"""CompileSpec: everything that a compile depends on, frozen. Readable from TOML (``llmc compile --spec``)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError
from llmc.quant.schemes import NONE, QUANT_METHODS, RTN, QuantRules, parse
from llmc.quant.shrink import PruneRule, RankRule

# searched for each weight within a bound on the perplexity: among schemes for floating-point activations, or for int8 ones
AUTO, AUTO_INT8 = "auto", "auto-a8"
# graph passes (passes/order.py) without which a result is the same, only slower to compute
OPTIONAL_PASSES = (
    "AbsorbLatent",
    "CancelTransposes",
    "ShareCoefficients",
    "RaiseActivations",
    "FuseGateUp",
    "FuseQKV",
    "FuseLinearEpilogue",
    "FuseNorm",
    "FuseAddNorm",
    "FuseRoPE",
    "FuseLatentHeads",
    "FoldWeights",
    "ViewReshapes",
    "SpecializeDecode",
)


class DType(str, Enum):
    """Element type of weights and activations."""

    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"

    @staticmethod
    def parse(text: str) -> DType:
        """Accept ``f32 f16 bf16`` and the long names."""
        short = {"f32": DType.F32, "f16": DType.F16, "bf16": DType.BF16}
        try:
            return short.get(text) or DType(text)
        except ValueError:
            raise LlmcError(
                "unknown-dtype",
                f"A dtype must be one of f32, f16, bf16; found {text!r}.",
                hint="Use --dtype bf16.",
            ) from None


class KVDType(str, Enum):
    """Element type of cache pages; with the last two, pages hold codes and a scale per token and cached head."""

    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"
    INT8 = "int8"
    FP8 = "float8_e4m3fn"

    @staticmethod
    def parse(text: str) -> KVDType:
        """Accept ``f32 f16 bf16 int8 fp8`` and the long names."""
        short = {"f32": KVDType.F32, "f16": KVDType.F16, "bf16": KVDType.BF16, "fp8": KVDType.FP8}
        try:
            return short.get(text) or KVDType(text)
        except ValueError:
            raise LlmcError(
                "unknown-kv-dtype",
                f"The dtype of the KV cache must be one of f32, f16, bf16, int8, fp8; found {text!r}.",
                hint="Use --kv-dtype int8, or leave it out: pages are then in --dtype.",
            ) from None


class Verify(str, Enum):
    """How much of the model the check at the end of a compile covers."""

    OFF = "off"
    SAMPLE = "sample"
    FULL = "full"


@dataclass(frozen=True)
class CompileSpec:
    """What to compile, for what, and how.

    Attributes:
        model: Hugging Face folder or hub id; ``<python object>`` when compiled from the Python API.
        target: ``cpu`` or a preset such as ``cpu/x86-64-v4`` or ``cpu/aarch64``; several are joined with commas
            (``cpu/x86-64-v3,x86-64-v4-bf16``, ``cuda/sm_80,sm_90``); ``cpu/x86-64`` is all levels of x86-64.
        dtype: of weights and activations; None = the checkpoint's.
        kv_dtype: of the cache pages; None = the same as dtype. int8 and fp8 take half of the memory of 16-bit pages.
        page_size: tokens per cache page, a multiple of 16.
        max_seq_len: longest sequence (prompt + new tokens); None = the checkpoint's limit.
        max_batch: most sequences in one step.
        max_step_tokens: most tokens in one step; longer prompts are prefilled in chunks of this size.
        verify: how much to check against the source model at the end.
        revision: hub revision.
        quant: scheme of the weights (llmc/quant/schemes.py); ``none`` = they stay in dtype; ``auto`` = searched for each
            weight, the smallest artifact within max_ppl_increase.
        quant_method: how quantized weights are made: ``rtn`` (round to nearest), or a calibrated method of
            llmc/quant/methods.py (gptq, awq, ...), which needs calib_text.
        quant_rules: pattern -> scheme for single weights; see QuantRules. The last pattern that matches wins.
        quant_head: scheme of the output projection (and of a tied embedding); None = 8 bits if quant has 4 or fewer (q8, or
            w8a8 or w8a8o with int8 activations), else as quant.
        quant_embedding: scheme of an embedding that is not tied to the head; None = not quantized.
        prune: weights that become zero, ``METHOD:N:M`` or ``METHOD:SHARE`` (llmc/quant/shrink.py); None = none.
        svd: rank, or share of the weights, of linear layers that become two of low rank; None = none do.
        meta_weights: compile the graph without weights (no weights and no check; for sizing).
        calib_text: text file for methods that look at activations.
        eval_text: text file on which the artifact is compared with the source model at the end.
        eval_tokens: so many tokens of it are used.
        max_kl: the compile fails if the mean KL divergence on eval_text (nats) is larger.
        max_ppl_increase: the compile fails if the perplexity on eval_text grows by more (percent; in TOML also "1%").
        disable_passes: graph passes to leave out, of OPTIONAL_PASSES; to measure or to find what one of them does.
        records: file of tuning records to choose schedules by, beside those shipped; with `tune` also where it writes.
        tune: seconds to tune the kernels for before they are built (in TOML also "10m"); None = not at all.
    """

    model: str
    target: str = "cpu"
    dtype: DType | None = None
    kv_dtype: KVDType | None = None
    page_size: int = 32
    max_seq_len: int | None = None
    max_batch: int = 16
    max_step_tokens: int = 512
    verify: Verify = Verify.SAMPLE
    revision: str | None = None
    meta_weights: bool = False
    calib_text: str | None = None
    eval_text: str | None = None
    eval_tokens: int = 8192
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    quant: str = NONE
    quant_method: str = RTN
    quant_rules: tuple[tuple[str, str], ...] = ()
    quant_head: str | None = None
    quant_embedding: str | None = None
    disable_passes: tuple[str, ...] = ()
    prune: str | None = None
    svd: str | None = None
    records: str | None = None
    tune: float | None = None

    def __post_init__(self) -> None:
        self._check_passes()
        for name in filter(None, (self.quant_head, self.quant_embedding)):
            parse(name)
        self.rules()
        if self.page_size < 16 or self.page_size % 16:
            raise LlmcError(
                "page-size",
                f"page_size must be a multiple of 16, found {self.page_size}.",
                hint="Use 16, 32 or 64.",
            )
        for name in ("max_batch", "max_step_tokens", "eval_tokens"):
            if getattr(self, name) < 1:
                raise LlmcError("bound", f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.max_step_tokens < self.max_batch:
            raise LlmcError(
                "bound",
                f"max_step_tokens must be at least max_batch ({self.max_batch}), found {self.max_step_tokens}.",
            )
        if self.tune is not None and not self.tune > 0:
            raise LlmcError("tune-budget", f"A tuning budget must be more than zero; found {self.tune}.")
        self._check_method()
        self._check_transforms()
        self._check_gate()

    def _check_passes(self) -> None:
        unknown = [name for name in self.disable_passes if name not in OPTIONAL_PASSES]
        if unknown:
            raise LlmcError(
                "pass-not-optional",
                f"{', '.join(unknown)} cannot be disabled; the passes that can are {', '.join(OPTIONAL_PASSES)}.",
                hint="Give --disable-pass one of them; every other pass is needed for a right result.",
            )

    def _check_method(self) -> None:
        if self.quant_method not in QUANT_METHODS:
            raise LlmcError(
                "unknown-quant-method",
                f"A quantization method must be one of {', '.join(QUANT_METHODS)}; found {self.quant_method!r}.",
                hint="Use --quant-method gptq, for instance.",
            )
        if self._has_outliers() and self.calib_text is None and not self.meta_weights:
            raise LlmcError(
                "outliers-without-text",
                "Schemes with outlier columns (w8a8o, w4a8o) keep the inputs with the largest activations in floating point; "
                "these are found by running a text, and none is given.",
                hint="Add --calib FILE, or use w8a8 or w4a8.",
            )
        if self._has_outliers() and self.searches:
            raise LlmcError(
                "outliers-with-auto",
                "quant = auto measures weights that are rounded to the nearest; a rule asks for a scheme with outlier columns "
                "(w8a8o, w4a8o), which are found by calibration.",
                hint="Name another scheme in the rule, or a scheme in place of auto.",
            )
        if self.quant_method == RTN:
            return
        if self.calib_text is None:
            raise LlmcError(
                "method-without-text",
                f"The method {self.quant_method} looks at activations, and no text to calibrate with is given.",
                hint="Add --calib FILE.",
            )
        if self.meta_weights or self.searches or self.rules().is_empty:
            raise LlmcError(
                "method-without-weights",
                f"The method {self.quant_method} needs weights that a scheme is named for.",
                hint="Add --quant q4g32, for instance; it goes neither with --meta-weights nor with --quant auto.",
            )

    def _check_transforms(self) -> None:
        prune, svd = self.prune_rule(), self.rank_rule()
        if prune is None and svd is None:
            return
        if prune is not None and svd is not None:
            raise LlmcError(
                "prune-and-svd",
                "prune and svd were both given; the factors of a pruned weight would not be pruned.",
                hint="Give one of them.",
            )
        if self.calib_text is None and (prune is None or prune.needs_text):
            raise LlmcError(
                "method-without-text",
                f"{f'prune = {prune}' if prune else 'svd'} looks at activations, and no text to calibrate with is given.",
                hint="Add --calib FILE.",
            )
        if self.meta_weights or self.searches:
            raise LlmcError(
                "transform-without-weights",
                f"{'prune' if prune else 'svd'} changes weights; it goes neither with meta_weights nor with quant = auto.",
                hint="Leave one of them away.",
            )

    def prune_rule(self) -> PruneRule | None:
        """Which weights become zero; LlmcError if the text is not understood."""
        return None if self.prune is None else PruneRule.parse(self.prune)

    def rank_rule(self) -> RankRule | None:
        """How far linear layers are factored; LlmcError if the text is not understood."""
        return None if self.svd is None else RankRule.parse(str(self.svd))

    @property
    def searches(self) -> bool:
        """Whether the schemes are searched for."""
        return self.quant in (AUTO, AUTO_INT8)

    def calibrates(self) -> bool:
        """Whether weights are changed before they are packed."""
        looks = self.quant_method != RTN or self.prune is not None or self.svd is not None
        return looks or (self._has_outliers() and not self.meta_weights)

    def _has_outliers(self) -> bool:
        """Whether a scheme that is named has outlier columns, which only a calibration finds."""
        rules = self.rules()
        names = (
            rules.default,
            *(scheme for _, scheme in rules.patterns),
            self.quant_head,
            self.quant_embedding,
        )
        return any(scheme.outlier_share for name in names if name and (scheme := parse(name)))

    def _check_gate(self) -> None:
        for name in ("max_kl", "max_ppl_increase"):
            bound = getattr(self, name)
            if bound is None:
                continue
            if not 0 <= bound < float("inf"):
                raise LlmcError("bound", f"{name} must be at least 0, found {bound}.")
            if self.eval_text is None:
                raise LlmcError(
                    "gate-without-text",
                    f"{name} is a bound on figures that are measured on a text, and none is given.",
                    hint="Add --eval FILE.",
                )
        if self.searches and (self.max_ppl_increase is None or self.quant_head or self.quant_embedding):
            raise LlmcError(
                "quant-auto",
                "quant = auto searches the schemes within a bound: it needs max_ppl_increase, and takes no quant_head or "
                "quant_embedding.",
                hint="Add --eval FILE --max-ppl-increase 1%; fix single weights by quant_rules.",
            )
        if self.eval_text is not None and self.meta_weights:
            raise LlmcError(
                "eval-without-weights",
                "An artifact without weights cannot be evaluated on a text.",
                hint="Give --eval or --meta-weights, not both.",
            )

    def rules(self) -> QuantRules:
        """Which weight gets which scheme (before the search of ``auto``: the rules); LlmcError if a scheme is unknown."""
        return QuantRules(NONE if self.searches else self.quant, self.quant_rules)

    def head_scheme(self) -> str | None:
        """Scheme of the output projection: errors of the logits are seen directly, and it is read once per token."""
        if self.quant_head is not None:
            return self.quant_head
        scheme = parse(self.rules().default)
        if scheme is None or scheme.bits > 4:
            return None
        if scheme.activation_bits:
            return "w8a8o" if scheme.outlier_share else "w8a8"
        return "q8"

    def to_json(self) -> dict[str, Any]:
        """Plain values, fit for JSON and TOML."""
        plain = {k: (v.value if isinstance(v, Enum) else v) for k, v in asdict(self).items()}
        # pairs, not a table: the order of rules matters, and JSON's keys are sorted
        rules = [list(rule) for rule in self.quant_rules]
        return {**plain, "quant_rules": rules, "disable_passes": list(self.disable_passes)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> CompileSpec:
        """Inverse of to_json; unknown keys are refused by name."""
        known = {f.name for f in fields(CompileSpec)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise LlmcError(
                "unknown-spec-key",
                f"The spec has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}.",
                hint="Correct or remove them.",
            )
        if "model" not in values:
            raise LlmcError(
                "spec-without-model", "The spec needs a key 'model'.", hint='Add model = "FOLDER".'
            )
        out = dict(values)
        for key, parse_dtype in (("dtype", DType.parse), ("kv_dtype", KVDType.parse)):
            if out.get(key) is not None:
                out[key] = parse_dtype(out[key])
        for key in ("max_kl", "max_ppl_increase"):
            if out.get(key) is not None:
                out[key] = _number(key, out[key], percent=key == "max_ppl_increase")
        if "disable_passes" in out:
            out["disable_passes"] = _names("disable_passes", out["disable_passes"])
        if out.get("svd") is not None:  # TOML has it as a number
            out["svd"] = str(out["svd"])
        if isinstance(out.get("tune"), str):
            out["tune"] = parse_budget(out["tune"])
        if "quant_rules" in out:
            out["quant_rules"] = _rules(out["quant_rules"])
        if "verify" in out:
            try:
                out["verify"] = Verify(out["verify"])
            except ValueError:
                raise LlmcError(
                    "unknown-verify", f"verify must be off, sample or full; found {out['verify']!r}."
                ) from None
        return CompileSpec(**out)

    @staticmethod
    def from_toml(path: Path, **overrides: Any) -> CompileSpec:
        """Read a TOML file; values given in `overrides` win."""
        try:
            import tomllib
        except ModuleNotFoundError:  # Python 3.10
            import tomli as tomllib  # type: ignore[no-redef]
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise LlmcError("spec-unreadable", f"The spec {path} cannot be read: {e.strerror}.") from None
        except tomllib.TOMLDecodeError as e:
            raise LlmcError("spec-not-toml", f"The spec {path} is not valid TOML: {e}.") from None
        return CompileSpec.from_json({**values, **overrides})

    def with_(self, **changes: Any) -> CompileSpec:
        """A copy with some values replaced."""
        return replace(self, **changes)

    def hash(self) -> str:
        """Stable identifier of this spec (hex, 16 digits)."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)")


def parse_budget(text: str) -> float:
    """Seconds of ``90s``, ``10m``, ``1.5h`` or ``600``.

    Raises:
        LlmcError: not such a text, or no time at all.
    """
    match = _BUDGET.fullmatch(text.strip().lower())
    seconds = float(match[1]) * _UNITS[match[2]] if match else math.nan
    if math.isnan(seconds):
        raise LlmcError(
            "tune-budget",
            f"A tuning budget is a time such as 10m, 90s or 1h; found {text!r}.",
            hint="Use --budget 10m.",
        )
    if seconds <= 0:
        raise LlmcError(
            "tune-budget",
            f"A tuning budget must be more than zero; found {text}.",
            hint="Without a budget, leave tuning out: default schedules and known records are used.",
        )
    return seconds


def _number(key: str, value: Any, *, percent: bool) -> float:
    """A number, also as text; with a percent sign where that is its unit."""
    text = str(value).strip().removesuffix("%" if percent else "")
    try:
        return float(text)
    except ValueError:
        example = "1 or 1%" if percent else "0.01"
        raise LlmcError("bound", f"{key} must be a number, e.g. {example}; found {value!r}.") from None


def _names(key: str, value: Any) -> tuple[str, ...]:
    """Names from a list, or one name."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise LlmcError("spec-names", f"{key} must be a list of names; found {value!r}.")
    return tuple(dict.fromkeys(names))


def _rules(value: Any) -> tuple[tuple[str, str], ...]:
    """Patterns in order, from a mapping (TOML, JSON) or pairs."""
    pairs = list(value.items()) if isinstance(value, dict) else list(value)
    if not all(len(p) == 2 and all(isinstance(x, str) for x in p) for p in pairs):
        raise LlmcError(
            "quant-rules",
            f"quant_rules must map patterns to scheme names; found {value!r}.",
            hint='In TOML: [quant_rules] then "*.down_proj" = "q6g64".',
        )
    return tuple((str(pattern), str(scheme)) for pattern, scheme in pairs)
