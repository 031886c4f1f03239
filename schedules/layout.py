"""How weights lie in memory for the matmul kernels. numpy only: the packer uses it without a compiler."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from llmc.caps import Capabilities

_TEXT = re.compile(r"blocked\(n=(\d+),k=(\d+)\)")


@dataclass(frozen=True)
class BlockedLayout:
    """A weight [N, K] cut into blocks of `n_block` rows, `k_pack` neighbouring columns kept together.

    packed[b, j, r, p] = weight[b * n_block + r, j * k_pack + p], zero outside of the weight. One block is one
    contiguous stream: for each step of k_pack columns, a row of lanes that each hold one output.

    Attributes:
        n_block: outputs per block, a multiple of the vector width of the kernel that reads it.
        k_pack: columns that one lane holds next to each other (2 for a two-way dot product).
    """

    n_block: int
    k_pack: int

    def packed_shape(self, n: int, k: int) -> tuple[int, int, int, int]:
        """Shape of a packed weight [n, k]."""
        return (-(-n // self.n_block), -(-k // self.k_pack), self.n_block, self.k_pack)

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Pack [N, K], or [E, N, K] per leading index, of any dtype; pads with zeros.

        Returns:
            A C-contiguous array [..., ceil(N/n_block), ceil(K/k_pack), n_block, k_pack] of the same dtype.
        """
        *lead, n, k = weight.shape
        blocks, steps, nb, kp = self.packed_shape(n, k)
        if (blocks * nb, steps * kp) != (n, k):
            padded = np.zeros((*lead, blocks * nb, steps * kp), weight.dtype)
            padded[..., :n, :k] = weight
            weight = padded
        split = weight.reshape(*lead, blocks, nb, steps, kp)
        packed = np.empty((*lead, blocks, steps, nb, kp), weight.dtype)
        unit = {2: np.uint16, 4: np.uint32, 8: np.uint64}.get(kp * weight.itemsize)
        if unit is None or not split.flags.c_contiguous:
            packed[...] = np.swapaxes(split, -3, -2)
            return packed
        # what stays together is moved as one number, a block at a time: both of its sides fit into the cache
        source, target = split.view(unit)[..., 0], packed.view(unit)[..., 0]
        for index in np.ndindex(*lead, blocks):
            target[index] = source[index].T
        return packed

    def pack_into(self, packed: np.ndarray, row: int, weight: np.ndarray) -> None:
        """Write rows [n, K] as rows [row, row + n) of a packed weight whose other rows stay as they are."""
        _, steps, nb, kp = packed.shape
        n, k = weight.shape
        if steps * kp != k:
            weight = np.pad(weight, ((0, 0), (0, steps * kp - k)))
        weight = weight.reshape(n, steps, kp)
        done = 0
        while done < n:
            block, lane = divmod(row + done, nb)
            if lane == 0 and n - done >= nb:  # whole blocks at once
                count = (n - done) // nb
                piece = weight[done : done + count * nb].reshape(count, nb, steps, kp)
                packed[block : block + count] = np.swapaxes(piece, 1, 2)
                done += count * nb
                continue
            count = min(nb - lane, n - done)
            packed[block, :, lane : lane + count] = np.swapaxes(weight[done : done + count], 0, 1)
            done += count

    def unpack(self, packed: np.ndarray, n: int, k: int) -> np.ndarray:
        """Inverse of `pack` for a weight [..., n, k]."""
        *lead, blocks, steps, nb, kp = packed.shape
        full = np.swapaxes(packed, -3, -2).reshape(*lead, blocks * nb, steps * kp)
        return np.ascontiguousarray(full[..., :n, :k])

    def as_text(self) -> str:
        """The name that the manifest records, e.g. ``blocked(n=64,k=2)``."""
        return f"blocked(n={self.n_block},k={self.k_pack})"

    @staticmethod
    def parse(text: str) -> BlockedLayout:
        """Inverse of as_text.

        Raises:
            ValueError: not such a name.
        """
        match = _TEXT.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a blocked layout")
        return BlockedLayout(int(match[1]), int(match[2]))


def linear_layout(dtype: str, caps: Capabilities, vectors: int = 0) -> BlockedLayout:
    """The layout that the linear kernel wants for weights of `dtype` on a machine.

    `vectors` vectors of outputs per block; by default four where there are 32 registers, else two: with six or fewer
    rows of activations the accumulators then fill the register file. bf16 is kept in pairs also without a dot product
    instruction, because pairs in 32-bit lanes become two float32 vectors by a shift and a mask. A machine of threads
    takes blocks of 8 rows by 16 bytes: a warp then loads 512 consecutive bytes, and 8 x 8 elements of 16 bits are an
    operand tile.
    """
    if caps.simt:
        return BlockedLayout(8, 4 if dtype == "float32" else 8)
    vectors = vectors or usual_vectors(caps)
    return BlockedLayout(vectors * caps.lanes_f32, 2 if dtype == "bfloat16" else 1)


def usual_vectors(caps: Capabilities) -> int:
    """Vectors of outputs that kernels take at a time: with six rows of activations they fill the registers."""
    return 4 if caps.vector_registers >= 32 else 2


def own_vectors(layout: BlockedLayout, dtype: str, caps: Capabilities) -> int | None:
    """The `vectors` by which linear_layout gives this layout; None = its blocks are made for another machine's registers.

    Up to twice the usual number the tuner tries for a machine's own sake.
    """
    vectors, rest = divmod(layout.n_block, caps.lanes_f32)
    if rest or vectors > 2 * usual_vectors(caps) or linear_layout(dtype, caps, vectors) != layout:
        return None
    return 0 if vectors == usual_vectors(caps) else vectors
