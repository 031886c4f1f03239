"""Named quantization schemes, in one table, and the rules that say which weight gets which."""

from __future__ import annotations

import fnmatch
import functools
import re
from dataclasses import dataclass, replace
from enum import Enum

from llmc.errors import LlmcError


class Code(str, Enum):
    """What a weight's code stands for."""

    INT = "int"  # an integer; value = (code - zero) * scale
    NF4 = "nf4"  # index into the 16 quantiles of QLoRA (Dettmers et al. 2023, arXiv 2305.14314); value = table * scale
    NF4_BF16 = (
        "nf4b"  # the same with the quantiles rounded to bfloat16: pairs of them go into a bf16 dot product
    )
    E4M3 = "e4m3"  # an 8-bit float, 4 exponent bits, no infinities (OCP FP8); value = float * scale
    E2M1 = "e2m1"  # a 4-bit float with a power-of-two scale per 32 (OCP MX); value = float * scale


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored.

    Attributes:
        name: as the user gives it.
        bits: per code.
        code: what the code stands for.
        group_size: neighbouring inputs that share a scale (and zero point); 0 = a whole row (per output channel).
        symmetric: no zero points; codes are stored with an offset of 2**(bits-1).
        activation_bits: 0 = activations stay as they are; 8 = they are rounded on the fly to what the codes are: int8 with one
            scale per token, or e4m3 with one per token and, if the weight has groups, per group. See `activations`.
        scale_dtype: of the stored scales: float32, float16, bfloat16, or e8m0 (a power of two).
        offsets: asymmetric with a floating-point offset per group (of scale_dtype) in place of a zero point.
        super_group: inputs of a super-group, a multiple of group_size; scales (and offsets) are then 8-bit multiples of
            its scale (and offset), which are what has the scale_dtype. 0 = no such second level.
        outlier_share: one of so many inputs, those with the largest activations, is left out of the rounding to int8 and
            multiplied in floating point (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339); 0 = none. Which ones they are
            is found by calibration, the same for all weights that are packed as one.
        order: inputs are reordered so that those of a group are neighbours, and the order is stored with the weight;
            a digest of the order, or "p" for any. Only weights of the same order can be joined.

    Readers make weights with offsets, super-groups and orders; nothing is quantized to such a scheme.
    """

    name: str
    bits: int
    code: Code = Code.INT
    group_size: int = 0
    symmetric: bool = True
    activation_bits: int = 0
    scale_dtype: str = "float16"
    offsets: bool = False
    super_group: int = 0
    order: str = ""
    outlier_share: int = 0

    def outliers(self, inputs: int) -> int:
        """How many of `inputs` inputs are multiplied in floating point: whole multiples of 8."""
        if not self.outlier_share:
            return 0
        return min(inputs, -(-inputs // (8 * self.outlier_share)) * 8)

    def bits_per_weight(self, inputs: int) -> float:
        """Stored bits per weight of a row of `inputs`: with scales, zero points and outliers, without lists of inputs."""
        scale = 8 * SCALE_BYTES[self.scale_dtype]
        if self.super_group:
            levels = 2 if self.offsets else 1
            return self.bits + levels * (8 / self.group_size + scale / self.super_group)
        zero = scale if self.offsets else 0 if self.symmetric else 8
        kept = OUTLIER_BITS * self.outliers(inputs) / inputs
        return self.bits + kept + (scale + zero) / (self.group_size or inputs)

    @property
    def activations(self) -> Code | None:
        """What activations are rounded to, INT (int8) or E4M3; None = nothing."""
        if not self.activation_bits:
            return None
        return Code.E4M3 if self.code is Code.E4M3 else Code.INT

    @property
    def any_order(self) -> Scheme:
        """The scheme as a layout needs it: which order of inputs it is does not matter."""
        return replace(self, name=_ORDER.sub("p", self.name), order="p") if self.order else self


# bytes of a stored scale
SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "e8m0": 1}
OUTLIER_BITS = 16  # of a weight that is kept in floating point: bfloat16
_ORDER = re.compile(r"p[0-9a-f]{8}$")


def _table() -> dict[str, Scheme]:
    schemes = [Scheme("q8", 8, scale_dtype="float32")]
    for bits, sizes in ((8, (32, 64, 128)), (6, (32, 64, 128)), (4, (32, 64, 128)), (3, (32, 64, 128))):
        for size in sizes:
            schemes.append(Scheme(f"q{bits}g{size}", bits, group_size=size))
            schemes.append(Scheme(f"q{bits}g{size}a", bits, group_size=size, symmetric=False))
    schemes += [
        Scheme("nf4", 4, Code.NF4_BF16, group_size=64),
        Scheme("fp8", 8, Code.E4M3, scale_dtype="float32"),
        Scheme("mxfp4", 4, Code.E2M1, group_size=32, scale_dtype="e8m0"),
        Scheme("w8a8", 8, activation_bits=8, scale_dtype="float32"),
        Scheme("w4a8", 4, group_size=32, activation_bits=8),
        Scheme("w4a8g64", 4, group_size=64, activation_bits=8),
        Scheme("w4a8g128", 4, group_size=128, activation_bits=8),
        Scheme("w8a8o", 8, activation_bits=8, scale_dtype="float32", outlier_share=128),
        Scheme("w4a8o", 4, group_size=32, activation_bits=8, outlier_share=128),
        Scheme("fp8a8", 8, Code.E4M3, activation_bits=8, scale_dtype="float32"),
        Scheme("fp8a8g128", 8, Code.E4M3, group_size=128, activation_bits=8, scale_dtype="float32"),
    ]
    return {s.name: s for s in schemes}


# a suffix "a" means asymmetric: zero points; "o" after a8: outlier columns
SCHEMES = _table()


# what quantized checkpoints hold beside SCHEMES and the families of by_name; not for quantizing to
STORED_ONLY = {
    s.name: s
    for s in (
        # GGUF's k-quants: scales of scales
        Scheme("q4k", 4, group_size=32, symmetric=False, offsets=True, super_group=256),
        Scheme("q5k", 5, group_size=32, symmetric=False, offsets=True, super_group=256),
        Scheme("q6k", 6, group_size=16, super_group=256),
    )
}
# a suffix says what holds the scales: "f" float32, "b" bfloat16; "o" are offsets, "p" is an order of the inputs
_FAMILY = re.compile(
    r"(?P<code>q[234568]|nf4|fp8)(?:g(?P<size>\d+))?(?P<kind>[ao]?)(?P<scale>[fb]?)(?P<order>p(?:[0-9a-f]{8})?)?"
)
_SUFFIX = {"float16": "", "float32": "f", "bfloat16": "b"}


def has_layout(scheme: Scheme) -> bool:
    """Whether weights can be packed with groups of this size: 16, a multiple of 32, or whole rows."""
    return scheme.group_size == 16 or scheme.group_size % 32 == 0


def stored_scheme(
    code: Code,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    offsets: bool = False,
    scale_dtype: str = "float16",
    activation_bits: int = 0,
    order: str = "",
) -> Scheme:
    """The scheme with these properties; one that users can name if there is one.

    A scale per row is float32 (there are few, and float16 and bfloat16 fit in it). The name is one that by_name knows
    if the scheme has_layout and no 8-bit activations.
    """
    scale_dtype = scale_dtype if group_size else "float32"
    for scheme in SCHEMES.values():
        wanted = Scheme(
            scheme.name, bits, code, group_size, symmetric, activation_bits, scale_dtype, offsets, order=order
        )
        if wanted == scheme:
            return scheme
    base = {Code.INT: f"q{bits}", Code.NF4: "nf4", Code.E4M3: "fp8"}[code]
    # nf4 with its usual groups does without their size
    usual = code is Code.NF4 and group_size == 64 and scale_dtype == "float32"
    size = f"g{group_size}" if group_size and not usual else ""
    kind = "o" if offsets else "" if symmetric else "a"
    name = base + size + kind + (_SUFFIX[scale_dtype] if group_size else "")
    if activation_bits:
        name += f"i{activation_bits}"
    if order:
        name += "p" if order == "p" else f"p{order}"
    return Scheme(name, bits, code, group_size, symmetric, activation_bits, scale_dtype, offsets, order=order)


# how quantized weights are made; all but the first look at activations (llmc/quant/methods.py)
RTN = "rtn"
QUANT_METHODS = (RTN, "gptq", "awq", "awq+gptq", "smooth", "smooth+gptq", "rotate", "rotate+gptq")
NONE = "none"  # keeps a weight in the model's dtype


def rotates(method: str) -> bool:
    """Whether a method of QUANT_METHODS rotates the residual stream, so that embedding and head must be two tensors."""
    return method.startswith("rotate")


def parse(name: str) -> Scheme | None:
    """The scheme of that name; None for "none".

    Raises:
        LlmcError: unknown name, with the names that exist.
    """
    if name == NONE:
        return None
    if name not in SCHEMES:
        raise LlmcError(
            "unknown-scheme",
            f"A quantization scheme must be one of {', '.join([NONE, *SCHEMES])}; found {name!r}.",
            hint="Use --quant q4g32, for instance.",
        )
    return SCHEMES[name]


@functools.cache
def by_name(name: str) -> Scheme:
    """A scheme of either table, or of the families that quantized checkpoints hold: ``q3g128af``, ``nf4g256f``, ...

    Raises:
        KeyError: unknown.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if name in STORED_ONLY:
        return STORED_ONLY[name]
    match = _FAMILY.fullmatch(name)
    if match is None:
        raise KeyError(name)
    code = {"nf4": Code.NF4, "fp8": Code.E4M3}.get(match["code"], Code.INT)
    size = int(match["size"] or (64 if code is Code.NF4 else 0))
    scheme = stored_scheme(
        code,
        int(match["code"][-1]),
        size,
        symmetric=not match["kind"],
        offsets=match["kind"] == "o",
        scale_dtype={suffix: dtype for dtype, suffix in _SUFFIX.items()}[match["scale"]],
        order=(match["order"] or "")[1:] or ("p" if match["order"] else ""),
    )
    if scheme.name != name or not has_layout(scheme):
        raise KeyError(name)
    return scheme


def rounding_activations(scheme: Scheme) -> Scheme:
    """The scheme of the same weights with activations rounded to 8 bits; the scheme itself if none of SCHEMES is that."""
    for other in SCHEMES.values():
        if other.activation_bits == 8 and other == replace(scheme, name=other.name, activation_bits=8):
            return other
    return scheme


@dataclass(frozen=True)
class QuantRules:
    """Which weight gets which scheme.

    Attributes:
        default: scheme of every linear layer and expert that no pattern matches.
        patterns: (glob over the parameter's name without ``.weight``, scheme name), the last match wins;
            a pattern without a dot also matches the last part of the name: ``down_proj``, ``lm_head``.
    """

    default: str = NONE
    patterns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in (self.default, *(scheme for _, scheme in self.patterns)):
            parse(name)

    def named(self, parameter: str) -> str | None:
        """Name of the scheme that a pattern gives to the parameter; None if no pattern matches."""
        module = parameter.removesuffix(".weight")
        chosen = None
        for pattern, scheme in self.patterns:
            if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(
                module.rpartition(".")[2], pattern
            ):
                chosen = scheme
        return chosen

    @property
    def is_empty(self) -> bool:
        """True if nothing is quantized."""
        return self.default == NONE and all(scheme == NONE for _, scheme in self.patterns)
