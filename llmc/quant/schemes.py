"""Named quantization schemes, in one table, and the rules that say which weight gets which."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from enum import Enum

from llmc.errors import LlmcError


class Code(str, Enum):
    """What a weight's code stands for."""

    INT = "int"  # an integer; value = (code - zero) * scale
    NF4 = "nf4"  # index into the 16 quantiles of QLoRA (Dettmers et al. 2023, arXiv 2305.14314); value = table * scale
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
        activation_bits: 0 = activations stay floating point; 8 = int8 per token, quantized on the fly, integer dot products.
        scale_dtype: of the stored scales: float32, float16, or e8m0 (a power of two).
        offsets: asymmetric with a float32 offset per group in place of a zero point; only readers make such weights.
    """

    name: str
    bits: int
    code: Code = Code.INT
    group_size: int = 0
    symmetric: bool = True
    activation_bits: int = 0
    scale_dtype: str = "float16"
    offsets: bool = False

    def bits_per_weight(self, inputs: int) -> float:
        """Stored bits per weight of a row of `inputs`, scales and zero points included."""
        scale = {"float32": 32, "float16": 16, "e8m0": 8}[self.scale_dtype]
        zero = 32 if self.offsets else 0 if self.symmetric else 8
        return self.bits + (scale + zero) / (self.group_size or inputs)


def _table() -> dict[str, Scheme]:
    schemes = [Scheme("q8", 8, scale_dtype="float32")]
    for bits, sizes in ((8, (32, 64, 128)), (6, (32, 64, 128)), (4, (32, 64, 128)), (3, (32, 64, 128))):
        for size in sizes:
            schemes.append(Scheme(f"q{bits}g{size}", bits, group_size=size))
            schemes.append(Scheme(f"q{bits}g{size}a", bits, group_size=size, symmetric=False))
    schemes += [
        Scheme("nf4", 4, Code.NF4, group_size=64),
        Scheme("fp8", 8, Code.E4M3, scale_dtype="float32"),
        Scheme("mxfp4", 4, Code.E2M1, group_size=32, scale_dtype="e8m0"),
        Scheme("w8a8", 8, activation_bits=8, scale_dtype="float32"),
        Scheme("w4a8", 4, group_size=32, activation_bits=8),
        Scheme("w4a8g64", 4, group_size=64, activation_bits=8),
        Scheme("w4a8g128", 4, group_size=128, activation_bits=8),
    ]
    return {s.name: s for s in schemes}


# a suffix "a" means asymmetric: zero points
SCHEMES = _table()


def _stored_only() -> dict[str, Scheme]:
    schemes = [
        # GGUF's two-level scales, multiplied out
        Scheme("q4k", 4, group_size=32, symmetric=False, scale_dtype="float32", offsets=True),
        Scheme("q6k", 6, group_size=16, scale_dtype="float32"),
        Scheme("nf4f", 4, Code.NF4, group_size=64, scale_dtype="float32"),
        Scheme("q8a", 8, symmetric=False, scale_dtype="float32"),
        Scheme("q4", 4, scale_dtype="float32"),
        Scheme("q4a", 4, symmetric=False, scale_dtype="float32"),
        Scheme("fp8g128", 8, Code.E4M3, group_size=128, scale_dtype="float32"),
    ]
    for bits in (3, 4, 8):
        for size in (32, 64, 128):
            schemes.append(Scheme(f"q{bits}g{size}f", bits, group_size=size, scale_dtype="float32"))
            schemes.append(
                Scheme(f"q{bits}g{size}af", bits, group_size=size, symmetric=False, scale_dtype="float32")
            )
    return {s.name: s for s in schemes}


# what quantized checkpoints hold beside SCHEMES; not for quantizing to. A suffix "f" means float32 scales
STORED_ONLY = _stored_only()
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


def by_name(name: str) -> Scheme:
    """A scheme of either table.

    Raises:
        KeyError: unknown.
    """
    return SCHEMES[name] if name in SCHEMES else STORED_ONLY[name]


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

    def scheme_for(self, parameter: str) -> Scheme | None:
        """Scheme of the parameter ``model.layers.0.mlp.down_proj.weight``; None = not quantized."""
        return parse(self.named(parameter) or self.default)

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
