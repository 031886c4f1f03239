"""How quantized weights lie in memory for the matmul kernels. numpy only: the packer uses it without a compiler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.quant.schemes import SCHEMES, STORED_ONLY, Code, Scheme, by_name
from llmc.quant.weight import QuantizedWeight

Array = np.ndarray[Any, Any]

UNIT = 32  # columns that are packed together: the widest word of one-bit planes
INT_COLUMNS = 1 << 17  # 2**17 products of at most 128 * 127 fit into 32 bits
_ROW_PIECE = 64  # columns of a row with a single scale are padded to a multiple of this
_TEXT = re.compile(r"quant\(([a-z0-9]+),n=(\d+),of=(\d+)x(\d+)\)")
_SCALE_BYTES = {"float32": 4, "float16": 2, "e8m0": 1}


@dataclass(frozen=True)
class QuantLayout:
    """A QuantizedWeight [N, K] cut into blocks of `n_block` rows; a block is one stream of bytes.

        block = group*                           group = unit* scales [zeros]      for schemes with groups
        block = unit* scales                                                       for one scale per row
        unit  = 32 columns of all rows of the block, as bit planes

    8-bit codes: unit[k, r], one byte each; integers with the upper bit flipped, i.e. as signed numbers.
    Other widths are cut into planes of 4, 2, 1 bits (6 = 4 + 2, 3 = 2 + 1; lower bits first). A plane of p bits is
    32-bit words word[j, r], j < p, each with 32 / p codes of one row: the low half holds even columns, the high half
    odd ones, so that a word is also a vector of pairs. scales[r] and zeros[r] follow the units they belong to.
    Schemes with int8 activations have ``quads`` instead, four neighbouring columns of a row in a 32-bit lane, as four-way
    dot products of bytes want them: 8 bits: unit[k/4, r, k%4]; 4 bits: unit[k/8, r, k%4], the low half of a byte for the
    first four columns, the high half for the next. Codes stay unsigned. Sixteen rows of the 8-bit form (and of the 4-bit
    form once its halves are separated) are also the rows of a B tile of AMX (tdpbsud), [k/4][16][4] at a stride of 4 n_block.
    Rows past N and columns past K hold code 0 and scale 0: the kernel pads activations with zeros.

    Attributes:
        scheme: name of the scheme.
        n_block: outputs per block, a multiple of the vector width of the kernel that reads it.
        n, k: of the weight.
    """

    scheme: str
    n_block: int
    n: int
    k: int

    @property
    def of(self) -> Scheme:
        """The scheme itself."""
        return by_name(self.scheme)

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes, lower bits first."""
        return {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1)}[self.of.bits]

    @property
    def quads(self) -> bool:
        """Whether four columns of a row lie in a lane, for integer dot products."""
        return self.of.activation_bits > 0

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
    def piece(self) -> int:
        """Columns that a kernel takes at a time: within one group, a multiple of UNIT."""
        return min(self.of.group_size or _ROW_PIECE, _ROW_PIECE)

    @property
    def padded_k(self) -> int:
        size = self.of.group_size or _ROW_PIECE
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
        return _SCALE_BYTES[self.of.scale_dtype] * self.n_block

    @property
    def group_bytes(self) -> int:
        """Units, scales and zeros of a group in a block."""
        zeros = 0 if self.of.symmetric else self.n_block
        return self.group // UNIT * self.unit_bytes + self.scale_bytes + zeros

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the packed bytes (after a leading dimension of experts)."""
        return (self.blocks, self.groups * self.group_bytes)

    def pack(self, weight: QuantizedWeight) -> Array:
        """uint8 [..., blocks, bytes] of a QuantizedWeight [..., n, k]."""
        if weight.scheme.name != self.scheme or weight.codes.shape[-2:] != (self.n, self.k):
            raise ValueError(f"{self.as_text()} cannot hold {weight.scheme.name} {weight.codes.shape}")
        if weight.codes.ndim == 3:
            parts = (
                QuantizedWeight(weight.scheme, c, s, None if weight.zeros is None else weight.zeros[i])
                for i, (c, s) in enumerate(zip(weight.codes, weight.scales, strict=True))
            )
            return np.stack([self.pack(part) for part in parts])
        out = np.empty((self.blocks, self.groups, self.group_bytes), np.uint8)
        nb = self.n_block
        # blocks are packed a few at a time: the intermediate copies stay small
        step = max(1, (1 << 20) // (nb * self.padded_k))
        for at in range(0, self.blocks, step):
            rows = slice(at * nb, min((at + step) * nb, self.n))
            count = min(step, self.blocks - at)
            codes = _padded(weight.codes[rows], count * nb, self.padded_k)
            if self._flipped:
                codes = codes ^ 0x80
            split = codes.reshape(count, nb, self.groups, self.group // UNIT, UNIT)
            if self.quads:
                units = [self._quads(split)]
            else:
                units = [self._plane(split, low, bits) for low, bits in self._shifts()]
            body = np.concatenate(units, axis=-1).reshape(count, self.groups, -1)
            scales = _padded(weight.scales[rows], count * nb, self.groups).reshape(count, nb, self.groups)
            tail = [_bytes(self._stored_scales(scales).transpose(0, 2, 1))]
            if weight.zeros is not None:
                zeros = _padded(weight.zeros[rows], count * nb, self.groups)
                tail.append(_bytes(zeros.reshape(count, nb, self.groups).transpose(0, 2, 1)))
            out[at : at + count] = np.concatenate([body, *tail], axis=-1)
        return out.reshape(self.packed_shape)

    def unpack(self, packed: Array) -> QuantizedWeight:
        """Inverse of pack."""
        if packed.ndim == 3:
            parts = [self.unpack(p) for p in packed]
            zeros = None if self.of.symmetric else np.stack([p.zeros for p in parts if p.zeros is not None])
            codes, scales = np.stack([p.codes for p in parts]), np.stack([p.scales for p in parts])
            return QuantizedWeight(self.of, codes, scales, zeros)
        b, g, nb = self.blocks, self.groups, self.n_block
        data = packed.reshape(b, g, self.group_bytes)
        body, rest = np.split(data, [self.group // UNIT * self.unit_bytes], axis=-1)
        units = body.reshape(b, g, self.group // UNIT, self.unit_bytes)
        codes = np.zeros((b, nb, g, self.group // UNIT, UNIT), np.uint8)
        at = 0
        for low, bits in self._shifts():
            size = 4 * bits * nb
            plane = units[..., at : at + size]
            codes |= self._codes_of_quads(plane) if self.quads else self._codes_of_plane(plane, bits) << low
            at += size
        if self._flipped:
            codes ^= 0x80
        scales, zeros = np.split(rest, [self.scale_bytes], axis=-1)
        return QuantizedWeight(
            self.of,
            np.ascontiguousarray(codes.reshape(b * nb, -1)[: self.n, : self.k]),
            self._loaded_scales(np.ascontiguousarray(scales)).transpose(0, 2, 1).reshape(b * nb, g)[: self.n],
            None if self.of.symmetric else zeros.transpose(0, 2, 1).reshape(b * nb, g)[: self.n],
        )

    def as_text(self) -> str:
        """The name that the manifest records, e.g. ``quant(q4g32,n=64,of=2048x8192)``."""
        return f"quant({self.scheme},n={self.n_block},of={self.n}x{self.k})"

    @staticmethod
    def parse(text: str) -> QuantLayout:
        """Inverse of as_text.

        Raises:
            ValueError: not such a name.
        """
        match = _TEXT.fullmatch(text)
        if not match or (match[1] not in SCHEMES and match[1] not in STORED_ONLY):
            raise ValueError(f"{text!r} is not a layout of a quantized weight")
        return QuantLayout(match[1], int(match[2]), int(match[3]), int(match[4]))

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

    def _stored_scales(self, scales: Array) -> Array:
        if self.of.scale_dtype == "e8m0":  # 0 stands for the scale 0
            with np.errstate(divide="ignore"):
                return np.where(scales > 0, np.log2(scales) + 127, 0).astype(np.uint8)
        return scales.astype(np.dtype(self.of.scale_dtype).newbyteorder("<"))

    def _loaded_scales(self, data: Array) -> Array:
        if self.of.scale_dtype == "e8m0":
            return np.where(data > 0, np.exp2(data.astype(np.float32) - 127), 0).astype(np.float32)
        return data.view(np.dtype(self.of.scale_dtype).newbyteorder("<")).astype(np.float32)


def in_turns(weight: QuantizedWeight, n_block: int) -> QuantizedWeight:
    """Rows of a gate and rows of what it multiplies ([2n, K], one after the other) in turns, half a block of each.

    Both are padded to whole half blocks with rows of zeros.
    """
    index = turns(weight.codes.shape[-2], n_block)
    there = index >= 0

    def move(rows: Array) -> Array:
        return np.where(there[:, None], rows[np.maximum(index, 0)], 0).astype(rows.dtype)

    zeros = None if weight.zeros is None else move(weight.zeros)
    return QuantizedWeight(weight.scheme, move(weight.codes), move(weight.scales), zeros)


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
    if scheme.activation_bits and not scheme.group_size and k > INT_COLUMNS:
        raise LlmcError(
            "scheme-too-wide",
            f"{scheme.name} sums products of bytes in 32 bits, which holds up to {INT_COLUMNS} inputs; found {n} x {k}.",
            hint="Give this weight another scheme, such as q8, by a rule.",
        )
    n_block = (4 if caps.vector_registers >= 32 else 2) * caps.lanes_f32
    rows = -(-n // (n_block // 2)) * n_block if gated else n
    return QuantLayout(scheme.name, n_block, rows, k)


def _padded(values: Array, rows: int, columns: int) -> Array:
    if values.shape == (rows, columns):
        return values
    return np.pad(values, ((0, rows - values.shape[0]), (0, columns - values.shape[1])))


def _bytes(values: Array) -> Array:
    """The bytes of the last dimension."""
    return np.ascontiguousarray(values).view(np.uint8)
