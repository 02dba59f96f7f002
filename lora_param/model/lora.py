"""`LoRA`: the parametrization whose output is W + scale·(B @ A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_param.weight.rules  # noqa: F401  registers what operations do with an adapted weight
from lora_param.adapter import TENSORS, AdapterTarget
from lora_param.targets.regions import Region
from lora_param.weight.adapted import adapt
from lora_param.weight.update import Update, join_factors

__all__ = ["LoRA"]


class LoRA(nn.Module):
    """Registered on a weight, makes it read as W + scale·(B @ A).

    Registration goes through `lora_param.apply` or `lora_param.attach`; the class is public so
    that a model's parametrizations can be inspected and recognised.

    Attributes:
        lora_A: factor of shape (rank, in), or (E, rank, in) for a stack.
        lora_B: factor of shape (out, rank), or (E, out, rank) for a stack.
        settings: rank, alpha, scaling, dropout, initialisation and variant.
        region: the part of the weight that is adapted.
        adapter: name of the adapter it belongs to.
        enabled: the update takes part in the weight.
        strength: multiplies the scale; 1.0 as trained.

    Example:
        >>> import lora_param as lp
        >>> layer = lp.apply(nn.Linear(32, 16), ["weight"], rank=4)
        >>> layer.parametrizations.weight[0].lora_A.shape
        torch.Size([4, 32])
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(self, target: AdapterTarget, factors: dict[str, Tensor], adapter: str) -> None:
        super().__init__()
        self.adapter = adapter
        self.settings = target.settings
        self.region: Region = target.target.region
        self.enabled = target.enabled
        self.strength = target.strength
        self.lora_A = nn.Parameter(factors["lora_A"])
        self.lora_B = nn.Parameter(factors["lora_B"])
        self.register_buffer("initial_A", factors.get("initial_A"))
        self.register_buffer("initial_B", factors.get("initial_B"))

    @property
    def scale(self) -> float:
        """What multiplies B @ A."""
        return self.settings.scale * self.strength

    def update(self) -> Update:
        """ΔW as factors, scale and region."""
        A, B = join_factors(self.lora_A, self.lora_B, self.initial_A, self.initial_B)
        dropout = self.settings.dropout if self.training else 0.0
        return Update(A, B, self.scale, self.region, dropout)

    def forward(self, W: Tensor) -> Tensor:
        """W itself while disabled, otherwise the adapted weight: W's shape and dtype."""
        return adapt(W, self.update()) if self.enabled else W

    def factors(self) -> dict[str, Tensor]:
        """The tensors that an adapter file holds for this target, detached."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def copy_factors(self, factors: dict[str, Tensor]) -> None:
        """Overwrite the factors in place; the shapes have been checked."""
        for name, tensor in factors.items():
            mine = getattr(self, name)
            if mine is None:
                self.register_buffer(name, tensor.to(self.lora_A))
            else:
                mine.copy_(tensor)
        for name in ("initial_A", "initial_B"):
            if name not in factors:
                self.register_buffer(name, None)

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        state = "" if self.enabled else ", disabled"
        return (
            f"adapter={self.adapter!r}{self.region}, rank={self.settings.rank}, "
            f"scale={self.scale:g}{state}"
        )
