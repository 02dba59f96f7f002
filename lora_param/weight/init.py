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

from lora_param.errors import OptionError
from lora_param.targets.settings import FROM_WEIGHT, INITIAL, MADE, READ, Settings, parse_init
from lora_param.weight.variants import Fresh, variant_of

__all__ = ["METHODS", "fresh_tensors"]


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


def fresh_tensors(
    settings: Settings,
    matrix: tuple[int, ...],
    W: Callable[[], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The tensors of a new target, whose update is zero.

    Args:
        settings: rank, scale, initialisation and variant.
        matrix: shape of the target as a matrix (out, in), or (E, out, in) for a stack.
        W: gives the target as a matrix of that shape; called only by what starts from it.
        dtype: dtype of the tensors.
        device: where they live.
        generator: source of randomness; torch's own where None.

    Returns:
        What `Settings.shapes` and `Settings.fixed_shapes` name.

    Raises:
        OptionError: no such initialisation, or a variant that is read and not made.
    """
    if settings.variant in READ:
        accepted = f"{', '.join(MADE)}; {settings.variant} comes in files of other tools alone"
        raise OptionError("variant", settings.variant, accepted)
    device = torch.device(device)
    shapes = settings.shapes(matrix)
    if device.type == "meta":
        every = {**shapes, **settings.fixed_shapes(matrix)}
        return {n: torch.empty(s, dtype=dtype, device=device) for n, s in every.items()}

    def weight() -> Tensor:
        return W().detach().to(device, torch.promote_types(dtype, torch.float32))

    def factors() -> dict[str, Tensor]:
        return _initial_factors(settings, matrix, weight, dtype, device, generator)

    return variant_of(settings).fresh(Fresh(shapes, dtype, device, factors, weight, generator))


def _initial_factors(
    settings: Settings,
    matrix: tuple[int, ...],
    W: Callable[[], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """`lora_A` (*, rank, in), `lora_B` (*, out, rank), and the initial pair where there is one."""
    name, argument = parse_init(settings.init)
    *lead, rows, columns = matrix
    rank, scale = settings.rank, settings.scale

    def one(index: int | None) -> Factors:
        def weight() -> Tensor:
            return W() if index is None else W()[index]

        return METHODS[name](
            _Request(rows, columns, rank, scale, dtype, device, generator, argument, weight)
        )

    if lead:
        pairs = [one(i) for i in range(lead[0])]
        A, B = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    else:
        A, B = one(None)
    found = {"lora_A": A.to(dtype), "lora_B": B.to(dtype)}
    if name in FROM_WEIGHT:
        found |= {initial: found[factor].clone() for initial, factor in INITIAL.items()}
    return found
