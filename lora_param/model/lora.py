"""`LoRA`: the parametrization whose output is W + scale·(B @ A)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

import lora_param.weight.rules  # noqa: F401  registers what operations do with an adapted weight
from lora_param.adapter import TENSORS, AdapterTarget
from lora_param.targets.regions import Region
from lora_param.targets.settings import Settings
from lora_param.weight.adapted import AdaptedWeight, adapt
from lora_param.weight.dora import row_squares
from lora_param.weight.update import Update, compute_dtype, join_factors

__all__ = ["LoRA"]


_SCALE, _STRENGTH = "scale_tensor", "strength_tensor"


class _KnownSquares:
    """‖row‖² of a frozen base, which DoRA asks for at each read: computed when W has changed.

    Told by W's storage and version counter: writes through `.data` go unseen, as everywhere in
    torch. Neither copied nor pickled.
    """

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.version = -1
        self.squares: Tensor | None = None

    def of_region(self, W: Tensor, region: Region) -> Tensor | None:
        """`row_squares` of a region of W, or None where W trains, moves or is not a parameter."""
        if not isinstance(W, nn.Parameter) or (W.requires_grad and torch.is_grad_enabled()):
            return None
        if W.is_inference():
            return None
        known = self.of
        if known is None or known.data_ptr() != W.data_ptr() or self.version != W._version:
            with torch.inference_mode(False), torch.no_grad():  # kept: training may read it next
                part = W[region.index].to(compute_dtype(W.dtype))
                self.squares = row_squares(part.reshape(region.matrix(tuple(W.shape))))
            self.of, self.version = W.detach(), W._version
        return self.squares

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _KnownSquares, ()


class LoRA(nn.Module):
    """Registered on a weight, makes it read as W + scale·(B @ A).

    Registration goes through `lora_param.apply` or `lora_param.attach`; the class is public so
    that a model's parametrizations can be inspected and recognised.

    Attributes:
        lora_A: factor of shape (rank, in), or (E, rank, in) for a stack.
        lora_B: factor of shape (out, rank), or (E, out, rank) for a stack.
        magnitude: DoRA's length of each row, (out,) or (E, out); None for plain LoRA.
        settings: rank, alpha, scaling, dropout, initialisation and variant.
        region: the part of the weight that is adapted.
        adapter: name of the adapter it belongs to.
        enabled: the update takes part in the weight.
        strength: multiplies ΔW; 1.0 as trained.
        scale: what multiplies B @ A; set through `configure`. Strength is part of it, but not for
            DoRA, whose norm it would change.

    Example:
        >>> import lora_param as lp
        >>> layer = lp.apply(nn.Linear(32, 16), ["weight"], rank=4)
        >>> layer.parametrizations.weight[0].lora_A.shape
        torch.Size([4, 32])
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    initial_A: Tensor | None
    initial_B: Tensor | None
    adapter: str
    region: Region
    enabled: bool
    settings: Settings
    strength: float
    scale: float
    dropout: float

    def __init__(self, target: AdapterTarget, factors: dict[str, Tensor], adapter: str) -> None:
        super().__init__()
        # Straight into __dict__: nn.Module's __setattr__ is half the time that attaching takes.
        self.__dict__.update(adapter=adapter, region=target.target.region, enabled=target.enabled)
        self.lora_A = nn.Parameter(factors["lora_A"])
        self.lora_B = nn.Parameter(factors["lora_B"])
        if "magnitude" in factors:
            self.magnitude = nn.Parameter(factors["magnitude"])
            self.__dict__["_squares"] = _KnownSquares()
        else:
            self._parameters["magnitude"] = None
        self.register_buffer("initial_A", factors.get("initial_A"))
        self.register_buffer("initial_B", factors.get("initial_B"))
        self.configure(target.settings, target.strength)

    def configure(self, settings: Settings, strength: float = 1.0) -> None:
        """Set settings and strength, and with them the scale.

        The scale is kept twice: as a number, which costs nothing in eager mode, and as a tensor,
        which compiled code reads anew at each call instead of being compiled for its value. So is
        DoRA's strength.
        """
        decomposed = self._parameters["magnitude"] is not None
        scale = settings.scale if decomposed else settings.scale * strength
        self.__dict__.update(
            settings=settings, strength=strength, scale=scale, dropout=settings.dropout
        )
        self._set_number(_SCALE, scale)
        if decomposed:
            self._set_number(_STRENGTH, strength)

    def _set_number(self, name: str, value: float) -> None:
        known = self._buffers.get(name)
        if known is None or known.is_meta:
            wide = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
            fresh = torch.full((), value, dtype=wide, device=self.lora_A.device)
            self.register_buffer(name, fresh, persistent=False)
        else:
            known.fill_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, as for any module; the scale is not rounded with the factors."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        del self._buffers[_SCALE]
        self._buffers.pop(_STRENGTH, None)
        self.configure(self.settings, self.strength)
        return self

    def update(self, W: Tensor | None = None) -> Update:
        """ΔW as factors, scale and region; with W, also what DoRA knows of it."""
        own, fixed = self._parameters, self._buffers  # each weight access passes here: no getattr
        A, B = join_factors(
            cast(Tensor, own["lora_A"]),
            cast(Tensor, own["lora_B"]),
            fixed["initial_A"],
            fixed["initial_B"],
        )
        dropout = self.dropout if self.training else 0.0
        compiling = torch.compiler.is_compiling()
        scale = fixed[_SCALE] if compiling else self.scale
        u = Update(A, B, cast(float, scale), self.region, dropout)
        magnitude = own["magnitude"]
        if magnitude is not None:
            u.magnitude = magnitude
            u.strength = cast(float, fixed[_STRENGTH]) if compiling else self.strength
            if W is not None and not compiling:
                base = W.base if isinstance(W, AdaptedWeight) else W
                u.squares = self.__dict__["_squares"].of_region(base, self.region)
        return u

    def forward(self, W: Tensor) -> Tensor:
        """W itself while disabled, otherwise the adapted weight: W's shape and dtype."""
        return adapt(W, self.update(W)) if self.enabled else W

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
                self.register_buffer(name, tensor.to(self.lora_A))  # of the initial pair
            else:
                mine.copy_(tensor)
        for name in ("initial_A", "initial_B"):
            if name not in factors:
                self.register_buffer(name, None)

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        state = "" if self.enabled else ", disabled"
        variant = "" if self.magnitude is None else ", dora"
        return (
            f"adapter={self.adapter!r}{self.region}, rank={self.settings.rank}, "
            f"scale={self.scale:g}{variant}{state}"
        )
