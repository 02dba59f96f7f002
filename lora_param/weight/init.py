"""Initialisations of the factors, by name.

Each takes the random generator and the target's matrix and returns A and B; those that start from
the weight's own directions (pissa, olora) leave W alone and are subtracted as `initial_A` and
`initial_B` instead, so that a fresh adapter changes nothing and a disabled one is the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_param.targets.settings import parse_init
from lora_param.weight.dora import row_norms, row_squares

__all__ = ["METHODS", "initial_factors"]


@dataclass(frozen=True)
class _Request:
    """What an initialisation is given. `W()` is the target as a matrix (out, in), in fp32."""

    rows: int
    columns: int
    rank: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator | None
    argument: float | None
    W: Callable[[], Tensor]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def zero_B(self) -> Tensor:
        return torch.zeros(self.rows, self.rank, dtype=self.dtype, device=self.device)


Factors = tuple[Tensor, Tensor]


def _kaiming(r: _Request) -> Factors:
    """A kaiming-uniform with a = √5, that is U(-1/√in, 1/√in); B zero (the LoRA default)."""
    bound = 1 / math.sqrt(r.columns)
    A = r.empty(r.rank, r.columns).uniform_(-bound, bound, generator=r.generator)
    return A, r.zero_B()


def _he(r: _Request) -> Factors:
    """A he-uniform, U(-√(6/in), √(6/in)); B zero."""
    bound = math.sqrt(6 / r.columns)
    A = r.empty(r.rank, r.columns).uniform_(-bound, bound, generator=r.generator)
    return A, r.zero_B()


def _normal(r: _Request) -> Factors:
    """A from N(0, STD), by default 1/rank; B zero."""
    std = 1 / r.rank if r.argument is None else r.argument
    return r.empty(r.rank, r.columns).normal_(0, std, generator=r.generator), r.zero_B()


def _orthogonal(r: _Request) -> Factors:
    """A with orthonormal rows; B zero."""
    normal = r.empty(r.columns, r.rank).normal_(0, 1, generator=r.generator)
    Q, R = torch.linalg.qr(normal)  # (in, rank), (rank, rank)
    return (Q * R.diagonal().sign()).T.contiguous(), r.zero_B()


def _pissa(r: _Request) -> Factors:
    """The principal singular directions: B √S-scaled left ones, A right ones.

    Meng et al. 2024, https://arxiv.org/abs/2404.02948, eq. 2 and 3.
    """
    U, S, Vh = torch.linalg.svd(r.W(), full_matrices=False)
    root = (S[: r.rank] / r.scale).sqrt()
    return root[:, None] * Vh[: r.rank], U[:, : r.rank] * root


def _olora(r: _Request) -> Factors:
    """Orthonormal B from the QR decomposition of W, A from its R.

    Büyükakyüz 2024, https://arxiv.org/abs/2406.01775, algorithm 1.
    """
    Q, R = torch.linalg.qr(r.W())  # (out, min), (min, in)
    return R[: r.rank] / r.scale, Q[:, : r.rank].contiguous()


METHODS: dict[str, Callable[[_Request], Factors]] = {
    "kaiming": _kaiming,
    "he": _he,
    "normal": _normal,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
}
_FROM_WEIGHT = {"pissa", "olora"}


def initial_factors(
    matrix: tuple[int, ...],
    *,
    rank: int,
    scale: float,
    init: str,
    W: Callable[[], Tensor],
    variant: str = "lora",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Fresh factors for a target.

    Args:
        matrix: shape of the target as a matrix (out, in), or (E, out, in) for a stack.
        rank: rows of A and columns of B.
        scale: what will multiply B @ A.
        init: a name of `METHODS`; `normal` takes its standard deviation as `normal:STD`.
        W: gives the target as a matrix of that shape; called only by what starts from it.
        variant: dora takes a magnitude as well.
        dtype: dtype of the factors.
        device: where they live.
        generator: source of randomness; torch's own where None.

    Returns:
        `lora_A` (*, rank, in) and `lora_B` (*, out, rank), for pissa and olora the equal
        `initial_A` and `initial_B` that are subtracted, for dora the `magnitude` (*, out).

    Raises:
        OptionError: no such initialisation.
    """
    name, argument = parse_init(init)
    *lead, rows, columns = matrix
    device = torch.device(device)
    if device.type == "meta":
        shapes = {"lora_A": (*lead, rank, columns), "lora_B": (*lead, rows, rank)}
        if name in _FROM_WEIGHT:
            shapes |= {f"initial_{n[-1]}": shape for n, shape in shapes.items()}
        if variant == "dora":
            shapes["magnitude"] = (*lead, rows)
        return {n: torch.empty(s, dtype=dtype, device=device) for n, s in shapes.items()}

    def one(index: int | None) -> Factors:
        def weight() -> Tensor:
            full = W().detach().to(device, torch.promote_types(dtype, torch.float32))
            return full if index is None else full[index]

        return METHODS[name](
            _Request(rows, columns, rank, scale, dtype, device, generator, argument, weight)
        )

    if lead:
        pairs = [one(i) for i in range(lead[0])]
        A, B = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    else:
        A, B = one(None)
    A, B = A.to(dtype), B.to(dtype)
    factors = {"lora_A": A, "lora_B": B}
    if name in _FROM_WEIGHT:
        factors |= {"initial_A": A.clone(), "initial_B": B.clone()}
    if variant == "dora":
        squares = row_squares(W().detach().to(device, torch.promote_types(dtype, torch.float32)))
        factors["magnitude"] = row_norms(squares).to(dtype)
    return factors
