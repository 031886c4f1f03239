"""The artifact: the only thing that compiler and runtime share.

DIR/model.so                 host code; carries the manifest too (symbol llmc_manifest)
DIR/model-LEVEL.so           the same functions for processors with fewer features, if compiled for several levels
DIR/weights-00001.safetensors ...
DIR/manifest.json            this module's Manifest
DIR/tokenizer.json ...       tokenizer files, copied from the checkpoint
DIR/tuning.jsonl             tuning records that schedules were chosen by, if any; a file for --records
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import llmc
from llmc.errors import LlmcError
from llmc.kv_plan import KVPlan

# raised by every change of what a manifest holds or means; tests/test_manifest.py notices new fields (docs/design/004)
SCHEMA = 4
# what came since has defaults that mean what was before: 4 added KVGroup.latent
OLDEST = 3
MANIFEST = "manifest.json"
LIBRARY = "model.so"
TUNING = "tuning.jsonl"
# files that describe the checkpoint's tokenizer; copied as they are
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class ParamEntry:
    """One packed weight: `nbytes` bytes at `offset` (from the start of the file `shard`), C order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: str
    offset: int
    nbytes: int
    layout: str  # e.g. "rows" (as in the checkpoint) or "blocked(n=32,k=2)"
    sources: tuple[str, ...]  # names in the source model


@dataclass(frozen=True)
class StoredParams:
    """The packed weights of an artifact that lies in `folder`."""

    folder: Path
    entries: tuple[ParamEntry, ...]


@dataclass(frozen=True)
class TensorSpec:
    """An argument or result of a compiled function; symbolic dimensions are names."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class KernelEntry:
    """A kernel that a compiled function calls.

    `kind` is its class in words; `calls` are per step, `block_calls` per decoder block (the mean over blocks; 0 for what
    lies outside). `read` and `written` (bytes) and `operations` are of one call, formulas of llmc/kernel_work.py.
    """

    name: str
    kind: str
    calls: int
    block_calls: float
    read: str
    written: str
    operations: str


@dataclass(frozen=True)
class FunctionEntry:
    """A compiled function: arguments in order, then (as tuples) the KV pools and the parameters."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kernels: tuple[KernelEntry, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Upper bounds of the symbolic sizes, from the compile spec."""

    max_seq_len: int
    max_batch: int
    max_step_tokens: int


@dataclass(frozen=True)
class ModelInfo:
    """What the model was."""

    source: str
    architecture: str
    model_type: str
    vocab_size: int
    layers: int
    parameters: int  # number of weights in the source
    dtype: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False


@dataclass(frozen=True)
class TargetInfo:
    """What the artifact needs of a machine; checked when loading."""

    target: str
    preset: str
    triple: str
    mcpu: str
    features: tuple[str, ...]

    @property
    def level(self) -> str:
        """The preset without the target's name, e.g. ``x86-64-v3``."""
        return self.preset.partition("/")[2]


@dataclass(frozen=True)
class LayerQuality:
    """Error of a layer's output: root mean square of the difference over that of the float32 source's output.

    `source_error` is the same for the source model run in the artifact's dtype: what that dtype costs by itself.
    """

    path: str
    error: float
    source_error: float


@dataclass(frozen=True)
class TextQuality:
    """The artifact against the source model in float32 on a text.

    `text` is the sha256 of the tokens that were used. Perplexities are of `tokens` predicted tokens in windows of
    `window`; KL divergence is in nats; `increase_error` is the standard error of `increase_percent`.
    """

    text: str
    tokens: int
    window: int
    perplexity: float
    source_perplexity: float
    increase_percent: float
    increase_error: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    layers: tuple[LayerQuality, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class QualityReport:
    """The check of the compiled artifact against the source model in float32.

    `max_abs_error` is over logits; `tolerance` is what it had to stay under; `reference_noise` is the error of the
    source model itself when run in the artifact's dtype. `relative_error` is the root mean square of the
    difference over that of the reference logits (mean-centred per row). The source model of a quantized artifact
    is taken with the quantized weights; the figures `quant_*` are against the unquantized one, and have no bound.
    `text` is the evaluation on a text (against the unquantized model), if one was asked for.
    """

    mode: str  # off, sample, full
    tokens: int = 0
    prefill_max_abs_error: float | None = None
    decode_max_abs_error: float | None = None
    relative_error: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    reference_noise: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    note: str = ""
    quant_relative_error: float | None = None
    quant_kl_mean: float | None = None
    quant_top1_agreement: float | None = None
    text: TextQuality | None = None


@dataclass(frozen=True)
class DeviceKernel:
    """A compiled device kernel, as the assembler reports it; sizes in bytes per thread, `shared_bytes` per block."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int

    @property
    def spill_bytes(self) -> int:
        return max(self.spill_stores, self.spill_loads)


@dataclass(frozen=True)
class DeviceImage:
    """Kernels for one architecture: a file beside model.so, in a format of TVM's loader (cubin, ptx)."""

    arch: str
    file: str
    format: str


@dataclass(frozen=True)
class DeviceCode:
    """Code that runs on a device beside the host's model.so, and what compiled it."""

    compiler: str
    images: tuple[DeviceImage, ...]
    kernels: tuple[DeviceKernel, ...]


@dataclass(frozen=True)
class Level:
    """Code of the functions for one level of processor features; the weights are the same for all levels.

    `library` is its file; the other fields are what the manifest's of that name are for model.so.
    """

    library: str
    target: TargetInfo
    functions: tuple[FunctionEntry, ...]
    quality: QualityReport
    tuning_records: tuple[dict[str, Any], ...] = ()
    tasks: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.target.level


def library_name(level: str) -> str:
    """File of a lower level's code."""
    return f"model-{level}.so"


def is_library(name: str) -> bool:
    """Whether a file of an artifact with this name holds the code of a level."""
    return re.fullmatch(r"model(-[\w-]+)?\.so", name) is not None


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime must know. `files` maps file names to sha256 (libraries and weights; not itself).

    Target, functions, quality, tuning_records and tasks are those of model.so: of the only level, or of the best one.
    `lower_levels` are the others, best first.
    """

    schema: int
    llmc_version: str
    tvm_version: str
    created: str  # ISO 8601, UTC; the only field that differs between two compiles of one spec
    spec: dict[str, Any]
    model: ModelInfo
    target: TargetInfo
    limits: Limits
    kv_plan: KVPlan
    functions: tuple[FunctionEntry, ...]
    params: tuple[ParamEntry, ...]
    quality: QualityReport
    tuning_records: tuple[dict[str, Any], ...] = ()  # that schedules were chosen by
    tasks: tuple[dict[str, Any], ...] = ()  # kernels to tune: llmc.tune.extract.KernelUse
    versions: dict[str, str] = field(default_factory=dict)  # torch, transformers, ... that compiled it
    files: dict[str, str] = field(default_factory=dict)
    device: DeviceCode | None = None  # only of targets whose kernels run beside the host
    lower_levels: tuple[Level, ...] = ()

    @property
    def levels(self) -> tuple[Level, ...]:
        """All levels, best first."""
        own = Level(LIBRARY, self.target, self.functions, self.quality, self.tuning_records, self.tasks)
        return (own, *self.lower_levels)

    @property
    def libraries(self) -> tuple[str, ...]:
        """Files with the code of a level each."""
        return (LIBRARY, *(level.library for level in self.lower_levels))

    def at(self, level: Level) -> Manifest:
        """The manifest as if that level were the only one; its library carries this one."""
        return dataclasses.replace(
            self,
            target=level.target,
            functions=level.functions,
            quality=level.quality,
            tuning_records=level.tuning_records,
            tasks=level.tasks,
            lower_levels=(),
        )

    def without_libraries(self) -> Manifest:
        """Without the hashes of libraries, which no library can carry."""
        files = {name: digest for name, digest in self.files.items() if name not in self.libraries}
        return dataclasses.replace(self, files=files)

    def as_text(self) -> str:
        """JSON, stable key order; what a target does not have is left out."""
        plain = {key: value for key, value in to_plain(self).items() if value is not None}
        return json.dumps(plain, indent=1, sort_keys=True)

    @staticmethod
    def from_text(text: str, where: str) -> Manifest:
        """Parse and check the schema version.

        Raises:
            LlmcError: not JSON, fields missing or of a wrong kind, another schema version.
        """
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise LlmcError(
                "manifest-corrupt",
                f"{where} is not a readable llmc manifest: {e}.",
                hint="Compile the model again.",
            ) from None
        found = raw.get("schema") if isinstance(raw, dict) else None
        if type(found) is not int:
            raise LlmcError(
                "manifest-corrupt", f"{where} has no schema number.", hint="Compile the model again."
            )
        if not OLDEST <= found <= SCHEMA:
            age, writer = "a newer" if found > SCHEMA else "an older", raw.get("llmc_version")
            hint = "Compile the model again with this llmc"
            if isinstance(writer, str) and writer != llmc.__version__:
                hint += f", or install llmc {writer} that wrote it"
            raise LlmcError(
                "manifest-version",
                f"{where} is of {age} llmc: it has manifest schema {found}; this llmc reads schemas {OLDEST} to {SCHEMA}.",
                hint=f"{hint}.",
            )
        try:
            return typing.cast(Manifest, from_plain(Manifest, raw))
        except (KeyError, TypeError, ValueError) as e:
            raise LlmcError(
                "manifest-corrupt", f"{where} is damaged: {e}.", hint="Compile the model again."
            ) from None


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and tuples to JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """Inverse of to_plain for a dataclass type; raises KeyError/TypeError/ValueError on what does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is type(None):
                continue
            try:
                return from_plain(option, value)
            except (TypeError, ValueError, KeyError):
                continue
        raise TypeError(f"{value!r} is not {kind}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object for {kind}")
        hints = typing.get_type_hints(kind)
        out = {}
        for f in dataclasses.fields(kind):
            if f.name in value:
                out[f.name] = from_plain(hints[f.name], value[f.name])
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise KeyError(f"field {f.name!r} is missing")
        return typing.cast(Any, kind)(**out)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, found {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(from_plain(args[0], v) for v in value)
        if len(args) != len(value):
            raise ValueError(f"expected {len(args)} values, found {len(value)}")
        return tuple(from_plain(a, v) for a, v in zip(args, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, found {value!r}")
        return {k: from_plain(args[1], v) for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
