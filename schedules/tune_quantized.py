"""What kernel classes on quantized weights have in common for the tuner."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from llmc.caps import Capabilities
from llmc.quant.schemes import Code, Scheme, by_name
from llmc.schedules.qlayout import QuantLayout
from llmc.schedules.tunable import Bucket
from llmc.schedules.tune_weights import TunableWeight

# each with a way of its own to read codes, scales, zero points or offsets, or the order of the inputs
FLOAT_SCHEMES = ("q8", "q4g32", "q4g32a", "q3g64", "nf4", "nf4f", "fp8", "mxfp4", "q4k", "q4g32p", "fp8a8")
FLOAT_PREFETCHES = (0, 256, 512, 1024, 1536, 2304, 3072, 4096, 6144, 8192)
INT_SCHEMES = ("w8a8", "w4a8", "w4a8o")
INT_PREFETCHES = (0, 512, 1024, 2304, 4096, 18432)
ROWS_PER_TASK = (24, 48, 96, 144, 240, 384, 512)


class TunableQuantized(TunableWeight):
    """A class whose configs have a `layout` of a quantized weight; one with and one without integer products share them.

    Attributes:
        integer: whether it is the one with integer products.
        schemes: whose kernels stand for those of all schemes; see code_of.
        prefetches: worth trying.
    """

    integer: ClassVar[bool] = False
    schemes: ClassVar[tuple[str, ...]] = FLOAT_SCHEMES
    prefetches: ClassVar[tuple[int, ...]] = FLOAT_PREFETCHES

    def takes(self, config: Any) -> bool:
        return super().takes(config) and (config.layout.of.activations is Code.INT) == self.integer

    def sampled_schemes(self) -> list[Scheme]:
        return [by_name(name) for name in self.schemes]

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "layout": QuantLayout(**values["layout"])}

    def to_values(self, task: Any) -> dict[str, Any]:
        values = super().to_values(task)
        plain = {f.name: f.default for f in fields(task.layout)}
        values["layout"] = {k: v for k, v in values["layout"].items() if v != plain.get(k)}
        return values

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        # the kernels have their own paths for few and many rows, so a bucket makes them no smaller
        return super().candidate(task, schedule, None, caps)

    def multiplied(self, task: Any) -> str:
        """The dtype whose peak bounds the products."""
        return "int8" if self.integer else str(task.in_dtype)
