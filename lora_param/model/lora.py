"""`LoRA`: the parametrization whose output is W + scale·(B @ A)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, Self, Unpack, cast

import torch
from torch import Tensor, nn

import lora_param.weight.rules  # noqa: F401  registers what operations do with an adapted weight
from lora_param.adapter import AdapterTarget, check_name
from lora_param.errors import (
    ComputedWeightError,
    MismatchError,
    OptionError,
    UnsuitableWeightError,
)
from lora_param.targets.options import read_options, takes_settings
from lora_param.targets.regions import Region, parse_target
from lora_param.targets.settings import INITIAL, Settings, SettingsOptions
from lora_param.targets.weights import Weight
from lora_param.weight.adapted import AdaptedWeight, adapt, built
from lora_param.weight.base import dense, identity, logical_dtype, logical_shape
from lora_param.weight.init import fresh_tensors
from lora_param.weight.precision import compute_dtype
from lora_param.weight.update import Deferred, Update, fold_initial, make_update, merge
from lora_param.weight.variants import Variant, variant_of

__all__ = ["BuiltLoRA", "LoRA"]


_SCALE, _STRENGTH = "scale", "strength"


class _Known:
    """What a variant knows of a frozen base and asks for at each read: computed when W has changed.

    Told by W's storage and version counter: writes through `.data` go unseen, as everywhere in
    torch. Neither copied nor pickled.
    """

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.identity = (0, -1)
        self.value: Tensor | None = None

    def of_region(self, variant: Variant, W: Tensor, region: Region) -> Tensor | None:
        """`variant.known` for a region of W; None where W trains, moves or is not a parameter."""
        if not isinstance(W, nn.Parameter) or (W.requires_grad and torch.is_grad_enabled()):
            return None
        if W.is_inference():
            return None
        found = identity(W)
        if self.of is None or self.identity != found:
            with torch.inference_mode(False), torch.no_grad():  # kept: training may read it next
                full = dense(W)
                part = full[region.index].reshape(region.matrix(tuple(full.shape)))
                self.value = variant.known(part)
            self.of, self.identity = W.detach(), found
        return self.value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Known, ()


class LoRA(nn.Module):
    """Registered on a weight, makes it read as W + scale·(B @ A).

    `lora_param.apply` and `attach` register it on many weights at once. By hand it is registered
    like any parametrization of torch; everything else in this package then works on it alike, and
    names the adapter that it belongs to. Freezing the rest is the caller's then.

    Its parameters are what the variant trains: `lora_A` (rank, in) and `lora_B` (out, rank) for
    plain LoRA, with one more dimension in front for a stack, and DoRA's `magnitude` (out,).

    Attributes:
        settings: rank, alpha, scaling, dropout, initialisation and variant.
        region: the part of the weight that is adapted.
        adapter: name of the adapter it belongs to.
        enabled: the update takes part in the weight.
        scale: what multiplies B @ A: that of rank, alpha and scaling.
        strength: multiplies the update; 1.0 as trained.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = nn.Linear(32, 16)
        >>> layer = register_parametrization(layer, "weight", LoRA(layer.weight.shape, rank=4))
        >>> layer.parametrizations.weight[0].lora_A.shape
        torch.Size([4, 32])
    """

    adapter: str
    region: Region
    enabled: bool
    settings: Settings
    strength: float
    scale: float
    dropout: float
    variant: Variant
    _known: _Known

    shape: tuple[int, ...] | None = None  # of the weight, where it was made for one by hand

    @takes_settings
    def __init__(
        self,
        shape: Sequence[int] | Tensor,
        *,
        part: str = "",
        adapter: str = "default",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[SettingsOptions],
    ) -> None:
        """Make a fresh one, whose update is zero.

        Args:
            shape: that of the weight, or the weight itself: what starts from its values (pissa,
                olora, DoRA) needs those, and dtype and device are taken from it.
            part: a slice of the weight as in patterns: "[0:64]", "[:,0:64]", "[0/3]", "[*]".
            adapter: name of the adapter that it belongs to.
            dtype: of the factors; fp32 (fp64 for an fp64 weight) where None.
            device: of the factors; the weight's, or torch's default one, where None.
            generator: source of randomness; torch's own where None.
            **options: the settings.

        Raises:
            OptionError, UnknownOptionError: a setting outside its accepted values, or none.
            UnsuitableWeightError, SliceError, PatternError: a shape or a part that does not fit.
        """
        W = shape if isinstance(shape, Tensor) else None
        sizes = tuple(shape) if W is None else logical_shape(W)
        wide = torch.float32 if W is None else compute_dtype(logical_dtype(W))
        if reason := Weight("weight", sizes, str(wide).removeprefix("torch.")).unsuitable:
            raise UnsuitableWeightError(f"a weight of shape {sizes}", reason)
        target = parse_target(f"weight{part}", sizes)
        matrix = target.region.matrix(sizes)
        settings = read_options(LoRA, options).on_part(target.region, sizes)

        def values() -> Tensor:
            if W is None:
                starts = settings.init if settings.init != "kaiming" else settings.variant
                accepted = f"the weight itself, since {starts} starts from its values"
                raise OptionError("shape", sizes, accepted)
            return dense(W)[target.region.index].reshape(matrix)

        if device is None:
            device = torch.get_default_device() if W is None else W.device
        factors = fresh_tensors(
            settings, matrix, values, dtype=dtype or wide, device=device, generator=generator
        )
        super().__init__()
        self._set_up(AdapterTarget(target, settings), factors, check_name(adapter))
        self.__dict__["shape"] = sizes

    @classmethod
    def of(cls, target: AdapterTarget, factors: dict[str, Tensor], adapter: str) -> Self:
        """Of tensors that there are already, for a target that is known to fit its weight."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_up(target, factors, adapter)
        return self

    def _set_up(self, target: AdapterTarget, factors: dict[str, Tensor], adapter: str) -> None:
        # Straight into __dict__: nn.Module's __setattr__ is half the time that attaching takes.
        self.__dict__.update(adapter=adapter, region=target.target.region, enabled=target.enabled)
        self.__dict__["variant"] = variant_of(target.settings)
        self.__dict__["_known"] = _Known()
        for name in target.settings.axes:
            self._parameters[name] = nn.Parameter(factors[name])
        for name in INITIAL:
            self.register_buffer(name, factors.get(name))
        self.configure(target.settings, target.strength)

    def configure(self, settings: Settings, strength: float = 1.0) -> None:
        """Set settings and strength, and with them the scale.

        Scale and strength are kept twice: as numbers, which cost nothing in eager mode, and as
        tensors, which compiled code reads anew at each call instead of being compiled for them.
        """
        numbers = {_SCALE: settings.scale, _STRENGTH: strength}
        self.__dict__.update(settings=settings, dropout=settings.dropout, **numbers)
        for name, value in numbers.items():
            self._set_number(f"{name}_tensor", value)

    def _set_number(self, name: str, value: float) -> None:
        known = self._buffers.get(name)
        if known is None or known.is_meta:
            like = next(iter(self._parameters.values()))
            assert like is not None
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            fresh = torch.full((), value, dtype=wide, device=like.device)
            self.register_buffer(name, fresh, persistent=False)
        else:
            known.fill_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, as for any module; the scale is not rounded with the factors."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in (_SCALE, _STRENGTH):
            del self._buffers[f"{name}_tensor"]
        self.configure(self.settings, self.strength)
        return self

    def update(self, W: Tensor | None = None) -> Update | Deferred:
        """ΔW as the variant makes it of these tensors; with W, also what it knows of W."""
        # each weight access passes here: no getattr
        own, fixed = cast("dict[str, Tensor]", self._parameters), self._buffers
        known = None
        if torch.compiler.is_compiling():  # which compiles anew for each float that was read
            scale = cast(float, fixed["scale_tensor"])
            strength = cast(float, fixed["strength_tensor"])
        else:
            scale, strength = self.scale, self.strength
            if self.variant.uses_W and W is not None:
                base = W.base if isinstance(W, AdaptedWeight) else W
                known = self._known.of_region(self.variant, base, self.region)
        if not own:  # DataParallel and FSDP keep them as plain attributes
            own = {name: getattr(self, name) for name in self.settings.axes}
        tensors: Mapping[str, Tensor] = own
        if fixed["initial_A"] is not None:
            tensors = fold_initial({**own, **{n: cast(Tensor, fixed[n]) for n in INITIAL}})
        dropout = self.dropout if self.training else 0.0
        return make_update(self.variant, tensors, scale, strength, self.region, dropout, known)

    def update_of(self, tensors: Mapping[str, Tensor]) -> Update | Deferred:
        """ΔW of other tensors under this LoRA's settings: of those in a state dict."""
        own = fold_initial(tensors)
        return make_update(self.variant, own, self.scale, self.strength, self.region, 0.0, None)

    def forward(self, W: Tensor) -> Tensor:
        """W itself while disabled, otherwise the adapted weight: W's shape and dtype."""
        return adapt(W, self.update(W)) if self.enabled else W

    def __call__(self, W: Tensor) -> Tensor:
        """As of any module with hooks of its own; hooks on all modules mean layers, not weights.

        Hooks on the way back are given the gradient of the weight, so that it is built.
        """
        if self._backward_hooks or self._backward_pre_hooks:
            with built():
                return cast(Tensor, super().__call__(W))
        if self._forward_hooks or self._forward_pre_hooks:
            return cast(Tensor, super().__call__(W))
        return self.forward(W)

    def right_inverse(self, W: Tensor) -> NoReturn:
        """There is none: torch asks for it when it registers this, and when a weight is assigned.

        Raises:
            ComputedWeightError: always; registering is not stopped by it.
            MismatchError: it was made for a weight of another shape.
        """
        if self.shape is not None and self.shape != (found := logical_shape(W)):
            told = f"a LoRA for {self.shape}, a weight of {found}"
            raise MismatchError(f"the adapter {self.adapter!r}", "the weight", shapes=[told])
        raise ComputedWeightError("assigning")

    def factors(self) -> dict[str, Tensor]:
        """The tensors that an adapter file holds for this target, detached."""
        found = {**self._parameters, **{n: self._buffers[n] for n in INITIAL}}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def copy_factors(self, factors: dict[str, Tensor]) -> None:
        """Overwrite the factors in place; the shapes have been checked."""
        for name, parameter in self._parameters.items():
            cast(Tensor, parameter).copy_(factors[name])
        for name, factor in INITIAL.items():
            tensor = factors.get(name)
            self.register_buffer(name, None if tensor is None else tensor.to(getattr(self, factor)))

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        state = "" if self.enabled else ", disabled"
        variant = "" if self.settings.variant == "lora" else f", {self.settings.variant}"
        return (
            f"adapter={self.adapter!r}{self.region}, rank={self.settings.rank}, "
            f"scale={self.scale:g}{variant}{state}"
        )


class BuiltLoRA(LoRA):
    """On a weight of one dimension, such as a bias, which no operation's rule knows: built."""

    def forward(self, W: Tensor) -> Tensor:
        """W itself while disabled, otherwise W + ΔW as a plain tensor."""
        return merge(W, (self.update(W),)) if self.enabled else W
