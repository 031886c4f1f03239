"""Orthogonal matrices that spread outliers: randomised Hadamard matrices, as products of small factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

# a factor is multiplied as a dense matrix; larger powers of two are split
_LARGEST_FACTOR = 64
# elements that are rotated at once, in float64
_PIECE = 1 << 24


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x R with R = diag(signs) (F1 ⊗ F2 ⊗ ...), orthogonal.

    Attributes:
        signs: float64 [n], +1 or -1.
        factors: float64 [m, m] each, orthogonal; the product of the m is n.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @property
    def width(self) -> int:
        return len(self.signs)

    def apply(self, x: torch.Tensor, axis: int = -1, *, inverse: bool = False) -> torch.Tensor:
        """x R (x Rᵀ if `inverse`) along an axis whose size is a multiple of n: neighbouring n are rotated together.

        Returns:
            of x's dtype; computed in float64.
        """
        moved = x.movedim(axis, -1)
        rows = moved.reshape(-1, self.width)
        out = torch.empty_like(rows)
        step = max(1, _PIECE // self.width)
        for at in range(0, len(rows), step):
            out[at : at + step] = self._rows(rows[at : at + step], inverse)
        return out.reshape(moved.shape).movedim(-1, axis).contiguous()

    def _rows(self, rows: torch.Tensor, inverse: bool) -> torch.Tensor:
        out = rows.double() if inverse else rows.double() * self.signs
        before, after = 1, self.width
        for factor in self.factors:
            after //= len(factor)
            view = out.reshape(len(out) * before, len(factor), after)
            out = torch.matmul(factor if inverse else factor.T, view).reshape(rows.shape)
            before *= len(factor)
        return out * self.signs if inverse else out

    def undone(self, x: np.ndarray) -> np.ndarray:
        """float32 [..., n] without the rotation that it came with."""
        return np.asarray(self.apply(torch.from_numpy(x), inverse=True).numpy())

    def matrix(self) -> torch.Tensor:
        """R, float64 [n, n]."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


def random_rotation(width: int, seed: int, *, keep_mean: bool = False) -> Rotation:
    """A random orthogonal matrix whose entries are of one size, if there is one that is known.

    A Hadamard matrix with random signs (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456, section 3), for widths 2**k m
    with a Hadamard matrix of order m by Paley's constructions: m = 1, 12, 20, 28, 36, 44, ...; for other widths the
    Q of a random matrix.

    Args:
        keep_mean: R leaves the vector of ones as it is, so that subtracting the mean commutes with it.
    """
    generator = torch.Generator().manual_seed(seed)
    if keep_mean:
        first, second = _mean_first(width, generator), _mean_first(width, generator)
        return Rotation(torch.ones(width, dtype=torch.float64), (first @ second.T,))
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    factors = hadamard_factors(width)
    if factors is None:
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        factors = (q * torch.sign(r.diagonal()),)
    return Rotation(signs, factors)


def _mean_first(width: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix, random but for its first column, which is constant and positive."""
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    matrix[:, 0] = 1
    q, r = torch.linalg.qr(matrix)
    return torch.as_tensor(q * torch.sign(r.diagonal()))


@lru_cache(maxsize=16)
def hadamard_factors(width: int) -> tuple[torch.Tensor, ...] | None:
    """Orthogonal factors of a Hadamard matrix of that order over its square root; None if no construction is known."""
    core = width
    while core % 2 == 0:
        core //= 2
    power = width // core
    factors: list[torch.Tensor] = []
    if core > 1:
        found = None
        order = core
        while found is None and power % 4 == 0 and order < width:
            order *= 2
            found = _paley(order)
        if found is None:
            return None
        power = width // order
        factors.append(found / order**0.5)
    while power > 1:
        size = min(power, _LARGEST_FACTOR)
        factors.append(_sylvester(size) / size**0.5)
        power //= size
    return tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),)


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of that order from the quadratic residues of a prime (Paley 1933); None if neither way goes."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        residues = _jacobsthal(order - 1)
        matrix = torch.eye(order, dtype=torch.float64)
        matrix[0, 1:] = 1
        matrix[1:, 0] = -1
        matrix[1:, 1:] += residues
        return matrix
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1
        conference[1:, 1:] = _jacobsthal(half - 1)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    return None


def _jacobsthal(prime: int) -> torch.Tensor:
    """[q, q]: 1 where i - j is a square modulo q, -1 where it is not, 0 on the diagonal."""
    symbol = torch.full((prime,), -1.0, dtype=torch.float64)
    numbers = torch.arange(1, prime)
    symbol[(numbers * numbers) % prime] = 1
    symbol[0] = 0
    index = torch.arange(prime)
    return symbol[(index[:, None] - index[None]) % prime]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
