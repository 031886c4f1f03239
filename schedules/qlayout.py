"""How quantized weights lie in memory for the matmul kernels. numpy only: the packer uses it without a compiler."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.quant.schemes import OUTLIER_BITS, SCALE_BYTES, Code, Scheme, by_name
from llmc.quant.weight import QuantizedWeight
from llmc.schedules.layout import usual_vectors

Array = np.ndarray[Any, Any]

UNIT = 32  # columns that are packed together: the widest word of one-bit planes
WARP_ROWS = 32  # rows of a block for machines with threads: one for each of a warp
INT_COLUMNS = 1 << 17  # 2**17 products of at most 128 * 127 fit into 32 bits
_ROW_PIECE = 64  # columns of a row with a single scale are padded to a multiple of this
_LONGEST_PIECE = 256
_TEXT = re.compile(r"quant\(([a-z0-9]+),n=(\d+),of=(\d+)x(\d+)(,quads)?\)")
_PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
_ORDER_BYTES = 4  # of the number of a column
OUTLIER_BYTES = OUTLIER_BITS // 8


@dataclass(frozen=True)
class QuantLayout:
    """A QuantizedWeight [N, K] cut into blocks of `n_block` rows; a block is one stream of bytes.

        block = super* [outliers]                  rows without super-groups are one
        super = span* [super_scales [super_offsets]]
        span  = unit* scales [zeros or offsets]    a group, or the groups of 32 columns if they are smaller
        unit  = 32 columns of all rows of the block, as bit planes

    8-bit codes: unit[k, r], one byte each; integers with the upper bit flipped, i.e. as signed numbers.
    Other widths are cut into planes of 4, 2, 1 bits (6 = 4 + 2, 3 = 2 + 1; lower bits first). A plane of p bits is
    32-bit words word[j, r], j < p, each with 32 / p codes of one row: the low half holds even columns, the high half
    odd ones, so that a word is also a vector of pairs. scales[g, r], zeros[g, r] and offsets[g, r] of a span's groups
    follow the units they belong to; with super-groups they are signed bytes.
    Schemes with int8 activations (and layouts that are in_quads) have ``quads`` instead, four neighbouring columns of a
    row in a 32-bit lane, as four-way dot products of bytes want them: 8 bits: unit[k/4, r, k%4]; 4 bits: unit[k/8, r, k%4],
    the low half of a byte for the first four columns, the high half for the next. Codes stay unsigned. Sixteen rows of the
    8-bit form (and of the 4-bit form once its halves are separated) are also the rows of a B tile of AMX (tdpbsud),
    [k/4][16][4] at a stride of 4 n_block.
    Rows past N and columns past K hold code 0 and scale 0: the kernel pads activations with zeros.
    Schemes with an order of the inputs: after the last block, int32 order[k], which column of x the stored column k is.
    Schemes with outliers: bfloat16 outliers[j, r] at the end of a block, the weights of column columns[j]; int32 columns[j]
    after the last block.

    Attributes:
        scheme: name of the scheme.
        n_block: outputs per block, a multiple of the vector width of the kernel that reads it.
        n, k: of the weight.
        in_quads: 8-bit codes lie in quads though the activations are no integers: for machines that load words.
    """

    scheme: str
    n_block: int
    n: int
    k: int
    in_quads: bool = False

    @property
    def of(self) -> Scheme:
        """The scheme itself."""
        return by_name(self.scheme)

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes, lower bits first."""
        return _PLANES[self.of.bits]

    @property
    def quads(self) -> bool:
        """Whether four columns of a row lie in a lane, for integer dot products."""
        return self.of.activations is Code.INT or self.in_quads

    @property
    def _flipped(self) -> bool:
        """Whether codes are stored as signed bytes."""
        return self.planes == (8,) and self.of.code is Code.INT and not self.quads

    @property
    def group(self) -> int:
        """Columns that share a scale (padded)."""
        return self.of.group_size or self.padded_k

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.padded_k // self.group

    @property
    def span(self) -> int:
        """Columns whose units lie together, followed by their scales."""
        return max(self.group, UNIT)

    @property
    def super_group(self) -> int:
        """Columns of a super-group; without them those of a row."""
        return self.of.super_group or self.padded_k

    @property
    def piece(self) -> int:
        """Columns that a kernel takes at a time: of one group, dividing it."""
        return math.gcd(self.group, _LONGEST_PIECE)

    @property
    def padded_k(self) -> int:
        size = self.of.super_group or max(self.of.group_size, UNIT) if self.of.group_size else _ROW_PIECE
        return -(-self.k // size) * size

    @property
    def blocks(self) -> int:
        return -(-self.n // self.n_block)

    @property
    def unit_bytes(self) -> int:
        return UNIT * self.of.bits // 8 * self.n_block

    @property
    def scale_bytes(self) -> int:
        """Of all scales of a group in a block."""
        return self.n_block * (1 if self.of.super_group else SCALE_BYTES[self.of.scale_dtype])

    @property
    def shift_bytes(self) -> int:
        """Of its zero points or offsets."""
        return self.scale_bytes if self.of.offsets else 0 if self.of.symmetric else self.n_block

    @property
    def group_bytes(self) -> int:
        """Units, scales, zero points and offsets of a span in a block: of a group, or of the groups in 32 columns."""
        levels = self.scale_bytes + self.shift_bytes
        return self.span // UNIT * self.unit_bytes + self.span // self.group * levels

    @property
    def super_bytes(self) -> int:
        """A super-group of a block."""
        spans = self.super_group // self.span * self.group_bytes
        if not self.of.super_group:
            return spans
        return spans + SCALE_BYTES[self.of.scale_dtype] * self.n_block * (2 if self.of.offsets else 1)

    @property
    def outliers(self) -> int:
        """Columns that are multiplied in floating point."""
        return self.of.outliers(self.k)

    @property
    def outliers_at(self) -> int:
        """The byte of a block where their weights begin."""
        return self.padded_k // self.super_group * self.super_bytes

    @property
    def block_bytes(self) -> int:
        return self.outliers_at + OUTLIER_BYTES * self.outliers * self.n_block

    @property
    def listed(self) -> int:
        """Numbers of columns after the last block: the order of the inputs, or which are outliers."""
        return self.k if self.of.order else self.outliers

    @property
    def list_at(self) -> int:
        """The byte where they begin."""
        return -(-self.blocks * self.block_bytes // _ORDER_BYTES) * _ORDER_BYTES

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the packed bytes (after a leading dimension of experts)."""
        if self.listed:
            return (self.list_at + _ORDER_BYTES * self.listed,)
        return (self.blocks, self.block_bytes)

    @property
    def size(self) -> int:
        """Packed bytes (of one expert)."""
        return math.prod(self.packed_shape)

    def pack(self, weight: QuantizedWeight) -> Array:
        """uint8 [..., *packed_shape] of a QuantizedWeight [..., n, k]."""
        if weight.scheme.any_order.name != self.scheme or weight.codes.shape[-2:] != (self.n, self.k):
            raise ValueError(f"{self.as_text()} cannot hold {weight.scheme.name} {weight.codes.shape}")
        if weight.codes.ndim == 3:
            return np.stack([self.pack(weight.part(i)) for i in range(len(weight.codes))])
        out = np.empty((self.blocks, self.block_bytes), np.uint8)
        nb = self.n_block
        # blocks are packed a few at a time: the intermediate copies stay small
        step = max(1, (1 << 20) // (nb * self.padded_k))
        for at in range(0, self.blocks, step):
            count = min(step, self.blocks - at)
            rows = slice(at * nb, min((at + step) * nb, self.n))
            out[at : at + count] = self._pack_rows(weight.map(lambda a, rows=rows: a[rows]), count)
        listed = weight.order if weight.outlier_columns is None else weight.outlier_columns
        if listed is None:
            return out
        gap = np.zeros(self.list_at - out.size, np.uint8)
        return np.concatenate([out.reshape(-1), gap, _bytes(listed.astype("<i4"))])

    def columns_of(self, packed: Array) -> Array:
        """int32 [outliers]: which columns of a packed weight, uint8 [..., size], are outliers; read without the rest."""
        return np.ascontiguousarray(packed.reshape(-1)[self.list_at : self.size]).view("<i4")

    def unpack(self, packed: Array) -> QuantizedWeight:
        """Inverse of pack."""
        if packed.ndim > len(self.packed_shape):
            parts = [self.unpack(p) for p in packed]
            order = None if not self.of.order else np.stack([p.order for p in parts if p.order is not None])
            return replace(QuantizedWeight.join(parts, np.stack), order=order)
        order = None
        if self.of.order:
            order = np.ascontiguousarray(packed[self.list_at :]).view("<i4")
        b, nb, groups = self.blocks, self.n_block, self.span // self.group
        stored = -(-self.k // self.group)
        whole = packed.reshape(-1)[: b * self.block_bytes].reshape(b, self.block_bytes)
        supers = whole[:, : self.outliers_at].reshape(b, -1, self.super_bytes)
        spans = self.super_group // self.span
        body, tops = np.split(supers, [spans * self.group_bytes], axis=-1)
        body = body.reshape(b, -1, self.group_bytes)
        units, rest = np.split(body, [self.span // UNIT * self.unit_bytes], axis=-1)
        units = units.reshape(*units.shape[:2], -1, self.unit_bytes)
        codes = np.zeros((b, nb, *units.shape[1:3], UNIT), np.uint8)
        at = 0
        for low, bits in self._shifts():
            size = 4 * bits * nb
            plane = units[..., at : at + size]
            codes |= self._codes_of_quads(plane) if self.quads else self._codes_of_plane(plane, bits) << low
            at += size
        if self._flipped:
            codes ^= 0x80

        def rows(values: Array, per: int, columns: int) -> Array:
            """[b, x, per * nb] -> [n, columns]."""
            split = values.reshape(b, -1, per, nb).transpose(0, 3, 1, 2)
            return np.ascontiguousarray(split.reshape(b * nb, -1)[: self.n, :columns])

        raw = np.split(rest, [groups * self.scale_bytes], axis=-1)
        scales, shifts = (np.ascontiguousarray(r) for r in raw)
        made = QuantizedWeight(
            self.of,
            np.ascontiguousarray(codes.reshape(b * nb, -1)[: self.n, : self.k]),
            rows(self._loaded(scales), groups, stored),
            order=order,
        )
        if self.shift_bytes:
            name = "offsets" if self.of.offsets else "zeros"
            values = self._loaded(shifts) if self.of.offsets else shifts
            shift: dict[str, Any] = {name: rows(values, groups, stored)}
            made = replace(made, **shift)
        if self.outliers:
            kept = np.ascontiguousarray(whole[:, self.outliers_at :]).reshape(b, -1)
            weights = rows(_from_dtype(kept, "bfloat16")[:, None], self.outliers, self.outliers)
            made = replace(made, outlier_weights=weights, outlier_columns=self.columns_of(packed))
        if not self.of.super_group:
            return made
        # super-scales and super-offsets, in turns
        tops = _from_dtype(np.ascontiguousarray(tops), self.of.scale_dtype).reshape(
            b, supers.shape[1], -1, nb
        )
        found: dict[str, Any] = {}
        for i, name in enumerate(("scales", "offsets")[: tops.shape[2]]):
            top = rows(tops[:, :, i], 1, -(-self.k // self.super_group))
            found[name] = getattr(made, name) * self._spread_tops(top, stored)
            found[f"super_{name}"] = top
        return replace(made, **found)

    def as_text(self) -> str:
        """The name that the manifest records, e.g. ``quant(q4g32,n=64,of=2048x8192)``."""
        quads = ",quads" if self.in_quads else ""
        return f"quant({self.scheme},n={self.n_block},of={self.n}x{self.k}{quads})"

    @staticmethod
    def parse(text: str) -> QuantLayout:
        """Inverse of as_text.

        Raises:
            ValueError: not such a name.
        """
        match = _TEXT.fullmatch(text)
        if match:
            with suppress(KeyError):
                n_block, n, k = (int(match[i]) for i in (2, 3, 4))
                return QuantLayout(by_name(match[1]).name, n_block, n, k, match[5] is not None)
        raise ValueError(f"{text!r} is not a layout of a quantized weight")

    @staticmethod
    def is_layout(text: str) -> bool:
        """Whether `text` is the name of such a layout (and not of another kind)."""
        return text.startswith("quant(")

    def _shifts(self) -> list[tuple[int, int]]:
        """(lowest bit, width) of each plane."""
        return [(sum(self.planes[:i]), bits) for i, bits in enumerate(self.planes)]

    def _plane(self, codes: Array, low: int, bits: int) -> Array:
        """codes [b, nb, g, u, UNIT] -> bytes [b, g, u, 4 * bits * nb] of one plane."""
        codes = codes.transpose(0, 2, 3, 4, 1)  # b, g, u, k, r
        if bits == 8:
            return codes.reshape(*codes.shape[:3], -1)
        codes = (codes >> low) & ((1 << bits) - 1)
        each = 16 // bits  # codes per half word
        split = codes.reshape(*codes.shape[:3], bits, each, 2, self.n_block).astype(np.uint16)
        halves = np.zeros((*codes.shape[:3], bits, 2, self.n_block), np.uint16)
        for t in range(each):
            halves |= split[..., t, :, :] << (bits * t)
        words = halves[..., 0, :].astype(np.uint32) | halves[..., 1, :].astype(np.uint32) << 16
        return _bytes(words.reshape(*codes.shape[:3], -1))

    def _codes_of_plane(self, plane: Array, bits: int) -> Array:
        """Inverse of _plane, without the shift: uint8 [b, nb, g, u, UNIT]."""
        lead, nb = plane.shape[:3], self.n_block
        if bits == 8:
            return plane.reshape(*lead, UNIT, nb).transpose(0, 4, 1, 2, 3)
        words = np.ascontiguousarray(plane).view("<u4").reshape(*lead, bits, 1, 1, nb)
        each = 16 // bits
        shift = (np.arange(each, dtype=np.uint32) * bits)[:, None] + np.array([0, 16], np.uint32)
        codes = (words >> shift[..., None]) & ((1 << bits) - 1)
        return codes.astype(np.uint8).reshape(*lead, UNIT, nb).transpose(0, 4, 1, 2, 3)

    def _quads(self, codes: Array) -> Array:
        """codes [b, nb, g, u, UNIT] -> bytes [b, g, u, unit_bytes] of quads."""
        lead = (codes.shape[0], self.n_block, *codes.shape[2:4])
        if self.planes == (8,):
            bytes_ = codes.reshape(*lead, UNIT // 4, 4)
        else:
            halves = codes.reshape(*lead, UNIT // 8, 2, 4)
            bytes_ = halves[..., 0, :] | halves[..., 1, :] << 4
        return bytes_.transpose(0, 2, 3, 4, 1, 5).reshape(codes.shape[0], *codes.shape[2:4], -1)

    def _codes_of_quads(self, unit: Array) -> Array:
        """Inverse of _quads."""
        lead = unit.shape[:3]
        bytes_ = unit.reshape(*lead, -1, self.n_block, 4).transpose(0, 4, 1, 2, 3, 5)
        if self.planes == (4,):
            bytes_ = np.stack([bytes_ & 15, bytes_ >> 4], axis=-2)
        return np.asarray(bytes_.reshape(lead[0], self.n_block, *lead[1:], UNIT))

    def _pack_rows(self, weight: QuantizedWeight, count: int) -> Array:
        """uint8 [count, block bytes] of the rows of `count` blocks."""
        nb, in_span = self.n_block, self.span // self.group
        codes = _padded(weight.codes, count * nb, self.padded_k)
        if self._flipped:
            codes = codes ^ 0x80
        split = codes.reshape(count, nb, -1, self.span // UNIT, UNIT)
        if self.quads:
            units = [self._quads(split)]
        else:
            units = [self._plane(split, low, bits) for low, bits in self._shifts()]
        parts = [np.concatenate(units, axis=-1).reshape(count, split.shape[2], -1)]

        def by_block(values: Array, columns: int, per: int) -> Array:
            """[n, columns] -> [count, columns / per, per * nb]."""
            whole = _padded(values, count * nb, columns).reshape(count, nb, -1, per)
            return np.ascontiguousarray(whole.transpose(0, 2, 3, 1)).reshape(count, -1, per * nb)

        for values, tops in ((weight.scales, weight.super_scales), (weight.offsets, weight.super_offsets)):
            if values is not None:
                values = values if tops is None else self._multiples(values, tops)
                parts.append(_bytes(self._stored(by_block(values, self.groups, in_span))))
        if weight.zeros is not None:
            parts.append(by_block(weight.zeros, self.groups, in_span))
        spans = np.concatenate(parts, axis=-1)
        supers = [spans.reshape(count, self.padded_k // self.super_group, -1)]
        for tops in (weight.super_scales, weight.super_offsets):
            if tops is not None:
                supers.append(_bytes(_as_dtype(by_block(tops, supers[0].shape[1], 1), self.of.scale_dtype)))
        out = np.concatenate(supers, axis=-1).reshape(count, self.outliers_at)
        if weight.outlier_weights is None:
            return out
        kept = by_block(weight.outlier_weights, self.outliers, self.outliers)
        return np.concatenate([out, _bytes(_as_dtype(kept.reshape(count, -1), "bfloat16"))], axis=-1)

    def _stored(self, values: Array) -> Array:
        return values.astype(np.int8) if self.of.super_group else _as_dtype(values, self.of.scale_dtype)

    def _loaded(self, data: Array) -> Array:
        if self.of.super_group:
            return data.view(np.int8).astype(np.float32)
        return _from_dtype(data, self.of.scale_dtype)

    def _spread_tops(self, tops: Array, groups: int) -> Array:
        """Values of super-groups [n, S] for each group [n, groups]."""
        return np.repeat(tops, self.super_group // self.group, axis=-1)[:, :groups]

    def _multiples(self, values: Array, tops: Array) -> Array:
        """values [n, G] as whole multiples of tops [n, S]."""
        spread = self._spread_tops(tops, values.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            out = np.where(spread != 0, np.rint(values / spread), 0)
        if not (np.abs(out + 0.5) < 128).all() or not np.array_equal(out * spread, values):
            raise ValueError("scales are no multiples of their super-group's")
        return out


def in_turns(weight: QuantizedWeight, n_block: int) -> QuantizedWeight:
    """Rows of a gate and rows of what it multiplies ([2n, K], one after the other) in turns, half a block of each.

    Both are padded to whole half blocks with rows of zeros.
    """
    index = turns(weight.codes.shape[-2], n_block)
    there = index >= 0

    return weight.map(lambda rows: np.where(there[:, None], rows[np.maximum(index, 0)], 0).astype(rows.dtype))


def turns(rows: int, n_block: int) -> Array:
    """Which row each row of an in_turns weight is; -1 for padding. `rows` = 2n."""
    n, half = rows // 2, n_block // 2
    blocks = -(-n // half)
    row = np.arange(blocks * half).reshape(blocks, 1, half)
    return np.where(row < n, row + np.array([0, n])[:, None], -1).reshape(-1)


def quant_layout(scheme: Scheme, n: int, k: int, caps: Capabilities, *, gated: bool = False) -> QuantLayout:
    """The layout that the quantized linear kernel wants for a weight with n outputs on a machine.

    Args:
        gated: the weight has 2n rows, which are packed in_turns.

    Raises:
        LlmcError: more inputs than integer sums of the scheme hold.
    """
    integers = scheme.activations is Code.INT
    if integers and not scheme.group_size and k > INT_COLUMNS:
        raise LlmcError(
            "scheme-too-wide",
            f"{scheme.name} sums products of bytes in 32 bits, which holds up to {INT_COLUMNS} inputs; found {n} x {k}.",
            hint="Give this weight another scheme, such as q8, by a rule.",
        )
    n_block = WARP_ROWS if caps.simt else usual_vectors(caps) * caps.lanes_f32
    rows = -(-n // (n_block // 2)) * n_block if gated else n
    in_quads = caps.simt and scheme.bits == 8 and not integers
    return QuantLayout(scheme.any_order.name, n_block, rows, k, in_quads)


def _padded(values: Array, rows: int, columns: int) -> Array:
    if values.shape == (rows, columns):
        return values
    return np.pad(values, ((0, rows - values.shape[0]), (0, columns - values.shape[1])))


def _bytes(values: Array) -> Array:
    """The bytes of the last dimension."""
    return np.ascontiguousarray(values).view(np.uint8)


def _as_dtype(values: Array, dtype: str) -> Array:
    """float32 as stored."""
    if dtype == "e8m0":  # 0 stands for the scale 0
        with np.errstate(divide="ignore"):
            return np.where(values > 0, np.log2(values) + 127, 0).astype(np.uint8)
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(np.dtype(dtype).newbyteorder("<"))


def _from_dtype(data: Array, dtype: str) -> Array:
    """Bytes as float32."""
    if dtype == "e8m0":
        return np.where(data > 0, np.exp2(data.astype(np.float32) - 127), 0).astype(np.float32)
    if dtype == "bfloat16":
        return data.view(ml_dtypes.bfloat16).astype(np.float32)
    return data.view(np.dtype(dtype).newbyteorder("<")).astype(np.float32)
