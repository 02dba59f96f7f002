"""Every exception of the package.

    LoraParamError
    ├── UserError                     something the caller can put right
    │   ├── OptionError               a setting outside its accepted values
    │   │   └── LoraConfigError       a field of a LoraConfig that has no form here
    │   ├── UnknownOptionError        a keyword that is none of a function's
    │   ├── TargetError               choosing weights
    │   │   ├── PatternError          a pattern that cannot be read
    │   │   ├── NoMatchError          a pattern that matches nothing
    │   │   ├── UnsuitableWeightError a weight that LoRA cannot adapt
    │   │   ├── NoneSuitableError     a pattern that covers such weights alone
    │   │   ├── SliceError            a slice that does not fit its weight
    │   │   ├── OverlapError          two targets over the same elements
    │   │   └── TiedWeightsError      one side of a tied pair
    │   ├── ModelError                a live model in the wrong state
    │   │   ├── ComputedWeightError   writing into a weight that is computed
    │   │   ├── BelowAutogradError    an operation that would lose the factors' gradients
    │   │   ├── ChainError            another parametrization stands on an adapted weight
    │   │   ├── DependentUpdateError  baking one adapter would change what another adds
    │   │   ├── DuplicateTargetError  two LoRAs of one adapter on the same part of a weight
    │   │   ├── WrappedModelError     attaching behind a distributed wrapper
    │   │   ├── ResizeError           new rows for an adapted embedding
    │   │   ├── RetieError            tying weights of which one side is adapted
    │   │   ├── NotPretrainedError    a model that transformers could not load again
    │   │   └── VerificationError     an adapter that does not train as it should
    │   ├── AdapterError              an adapter, or its fit to a base
    │   │   ├── NoAdapterError        no adapter of that name
    │   │   ├── AdapterExistsError    a second adapter of the same name
    │   │   ├── MismatchError         names or shapes that differ: both sides listed
    │   │   ├── LayoutError           a target without a form in the base's layout
    │   │   ├── FingerprintError      same names and shapes, another base
    │   │   ├── UnsettledError        a file that leaves open what only its base tells
    │   │   ├── NoFormError           something that a format, or this package, cannot express
    │   │   ├── ResumeError           a training state of another base
    │   │   ├── UnchangedError        a bake that would change nothing
    │   │   ├── QuantizationLossError a bake that would lose most of an update
    │   │   ├── NoDifferenceError     two checkpoints between which no adapter leads
    │   │   ├── VariantError          an operation that this variant does not allow
    │   │   └── NonFiniteError        NaN or infinity where numbers are needed
    │   ├── NameRuleError             a line that is no rule between names
    │   ├── MissingPackageError       a package that only this needs
    │   └── FileError                 reading or writing
    │       ├── MissingFileError
    │       ├── BrokenFileError
    │       ├── UnsafePickleError
    │       ├── UnknownFileError
    │       └── OutputError
    └── InternalError                 a bug of ours

Errors take values and own their wording: what was found, what was expected, what to do. They
are one file, however long, so that the tree and the wording are seen together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

__all__ = [
    "AdapterError",
    "AdapterExistsError",
    "BelowAutogradError",
    "BrokenFileError",
    "ChainError",
    "ComputedWeightError",
    "DependentUpdateError",
    "DuplicateTargetError",
    "FileError",
    "FingerprintError",
    "InternalError",
    "LayoutError",
    "LoraConfigError",
    "LoraParamError",
    "MismatchError",
    "MissingFileError",
    "MissingPackageError",
    "ModelError",
    "NameRuleError",
    "NoAdapterError",
    "NoDifferenceError",
    "NoFormError",
    "NoMatchError",
    "NonFiniteError",
    "NoneSuitableError",
    "NotPretrainedError",
    "OptionError",
    "OutputError",
    "OverlapError",
    "PatternError",
    "QuantizationLossError",
    "ResizeError",
    "ResumeError",
    "RetieError",
    "SliceError",
    "TargetError",
    "TiedWeightsError",
    "UnchangedError",
    "UnknownFileError",
    "UnknownOptionError",
    "UnsafePickleError",
    "UnsettledError",
    "UnsuitableWeightError",
    "UserError",
    "VariantError",
    "VerificationError",
    "WrappedModelError",
]


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a sentence, the first `limit` of them and a count of the rest."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def escaped(text: str) -> str:
    """The text with what would steer a terminal written out: it may be the name of a file.

    That is every control character, the marks that turn the direction of writing, and lone
    surrogates.

    >>> escaped("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_at_command_line = False


def worded(library: str, command: str) -> str:
    """What to give, as the library takes it, or the command line while one of its commands runs.

    >>> worded("force=True", "--force")
    'force=True'
    """
    return command if _at_command_line else library


@contextmanager
def at_command_line() -> Iterator[None]:
    """Within the block, errors name the options of the command line."""
    global _at_command_line
    before, _at_command_line = _at_command_line, True
    try:
        yield
    finally:
        _at_command_line = before


class LoraParamError(Exception):
    """Root of every exception of this package; catch it to catch them all."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class InternalError(LoraParamError):
    """A bug of ours, never the caller's mistake."""

    def __init__(self, what: str) -> None:
        super().__init__(f"internal error: {what}. This is a bug in lora_param; please report it.")


class UserError(LoraParamError):
    """Something the caller can put right; the message says how."""


class OptionError(UserError, ValueError):
    """A setting outside its accepted values."""

    def __init__(self, option: str, found: object, accepted: str) -> None:
        super().__init__(f"{option} is {found!r}; accepted: {accepted}.")


class UnknownOptionError(UserError, TypeError):
    """A keyword that is none of a function's."""

    def __init__(
        self, function: str, found: str, nearest: Sequence[str], known: Sequence[str]
    ) -> None:
        hint = f"did you mean {nearest[0]}?" if nearest else f"it has {listed(known, len(known))}."
        super().__init__(f"{function} has no option {found!r}; {hint}")


class MissingPackageError(UserError, ImportError):
    """A package is not installed that only what was asked for needs."""

    def __init__(self, what: str, package: str, install: str) -> None:
        super().__init__(
            f"{what} needs {package}, which is not installed: pip install '{install}'."
        )


class LoraConfigError(OptionError):
    """A field of a `peft.LoraConfig` that cannot be done as it says."""

    def __init__(self, field: str, found: object, instead: str) -> None:
        super().__init__(f"{field} of the LoraConfig", found, instead)


class NameRuleError(UserError, ValueError):
    """A file of rules between names that cannot be read."""

    def __init__(self, source: str, number: int | None, line: str, why: str) -> None:
        where = source if number is None else f"line {number} of {source}"
        shown = f" {line.strip()!r}" if line.strip() else ""
        super().__init__(
            f"{where} cannot be read as rules between names: {why}.{shown} "
            f"A rule is e.g. '*.qkv_proj.weight = *.q_proj.weight | *.k_proj.weight'."
        )


# --- choosing weights -------------------------------------------------------------------------


class TargetError(UserError, ValueError):
    """Choosing weights went wrong."""


class PatternError(TargetError):
    """A pattern that cannot be read."""

    def __init__(self, pattern: str, reason: str) -> None:
        super().__init__(f"cannot read the pattern {pattern!r}: {reason}.")


class NoMatchError(TargetError):
    """A pattern that matches nothing."""

    def __init__(self, pattern: str, nearest: Sequence[str], considered: int) -> None:
        hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
        super().__init__(f"the pattern {pattern!r} matches none of {considered} weights.{hint}")
        self.pattern, self.nearest = pattern, tuple(nearest)


_NEEDED = "LoRA needs a floating-point parameter with at least two dimensions"


class UnsuitableWeightError(TargetError):
    """A weight that LoRA cannot adapt."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} cannot be adapted: it is {reason}. {_NEEDED}; leave it out or name another."
        )


class NoneSuitableError(TargetError):
    """A pattern that covers weights, none of which can be adapted by it.

    Args:
        pattern: as written.
        reasons: why not → the names of which it is true.
        suitable: names of weights that could be adapted if they were named.
    """

    def __init__(
        self, pattern: str, reasons: Mapping[str, Sequence[str]], suitable: Sequence[str]
    ) -> None:
        covered = sum(map(len, reasons.values()))
        told = "; ".join(f"{listed(names, 1)}: {reason}" for reason, names in reasons.items())
        hint = f"Name the weights to adapt, such as {', '.join(suitable)}" if suitable else _NEEDED
        super().__init__(
            f"the pattern {pattern!r} can adapt none of the {covered} weights that it covers "
            f"({told}). {hint}."
        )


class SliceError(TargetError):
    """A slice that does not fit its weight."""

    def __init__(self, target: str, shape: Sequence[int], reason: str) -> None:
        super().__init__(f"{target} does not fit the shape {tuple(shape)}: {reason}.")


class OverlapError(TargetError):
    """Two targets over the same elements."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second} overlap: keep one of them, or make them disjoint.")


class TiedWeightsError(TargetError):
    """One side of a tied pair."""

    def __init__(self, chosen: Sequence[str], others: Sequence[str]) -> None:
        together = worded("tied='together'", "--tied together")
        apart = worded("tied='apart'", "--tied apart")
        super().__init__(
            f"{listed(chosen)} is tied to {listed(others)} (one tensor under several names), and "
            f"only the first is targeted. Choose: {together} adapts them all with one set of "
            f"factors; {apart} adapts the first alone."
        )


# --- live models ------------------------------------------------------------------------------


class ModelError(UserError, RuntimeError):
    """A live model in the wrong state for what was asked."""


class ComputedWeightError(ModelError, NotImplementedError):
    """Writing into a weight that is computed from base and factors.

    To torch, which asks parametrizations for an inverse, it says that there is none.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation} writes into an adapted weight, which is computed as W + scale·(B @ A): "
            "the change would be lost. Write to the base (module.parametrizations.<name>.original) "
            "or to the factors, or call lora_param.bake(model) or lora_param.remove(model) first."
        )


class BelowAutogradError(ModelError):
    """An operation that takes an adapted weight below autograd, which would lose gradients."""

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation} was given an adapted weight in a way that would lose the gradients of "
            "its factors (jagged tensors, torch.vmap and torch.func.grad over the weight do that). "
            "Use weight.clone(), which is W + ΔW as a plain tensor with gradients, run the model "
            "within torch.nn.utils.parametrize.cached(), which reads every weight so, or use "
            "torch.no_grad() where no gradient is needed."
        )


class ChainError(ModelError):
    """Another parametrization stands on an adapted weight, so that W + ΔW has no place of its own.

    Args:
        name: the weight.
        others: classes of the other parametrizations.
        kept: adapters on it that were to stay.
    """

    def __init__(self, name: str, others: Sequence[str], kept: Sequence[str] = ()) -> None:
        what = f"{name} carries another parametrization besides LoRA ({listed(others)})"
        super().__init__(
            f"{what}. All parametrizations of a weight are baked together, and with them "
            f"{listed(kept)}, which was to stay: bake all adapters at once (adapter=None)."
            if kept
            else f"{what}, through which W + ΔW cannot be written. Remove that one first, or make "
            f"the whole chain one plain weight: bake(model, chain=True)."
        )


class DependentUpdateError(ModelError):
    """Baking one adapter would change what another adds, and so the output."""

    def __init__(self, key: str, baked: Sequence[str], kept: str, variant: str) -> None:
        super().__init__(
            f"{key}: baking {listed(baked)} alone would change what {kept!r} adds, and so the "
            f"model's output: an update of variant {variant} depends on the weight that it is "
            f"added to. Bake all adapters at once (adapter=None), or remove one of the two. "
            f"Nothing was written."
        )


class DuplicateTargetError(ModelError):
    """Two LoRAs of one adapter on the same part of a weight, registered by hand."""

    def __init__(self, key: str, adapter: str) -> None:
        super().__init__(
            f"two LoRAs of the adapter {adapter!r} stand on {key}, and an adapter holds one: give "
            f"each a name of its own, LoRA(..., adapter=...)."
        )


class WrappedModelError(ModelError):
    """Attaching to a model that is already wrapped for distributed training."""

    def __init__(self, wrapper: str) -> None:
        super().__init__(
            f"the model is already wrapped by {wrapper}, which would not see the new factors. "
            f"Apply LoRA first, then wrap."
        )


class ResizeError(ModelError):
    """New rows for an embedding whose factors would not fit them."""

    def __init__(self, names: Sequence[str], rows: int, wanted: int) -> None:
        super().__init__(
            f"{listed(names)} is adapted, and its factors would not fit it with {wanted} rows "
            f"instead of {rows}; nothing was changed. Resize before lora_param.apply(model), or "
            f"call lora_param.bake(model) or lora_param.remove(model) first."
        )


class RetieError(ModelError):
    """Tying two weights of which only one carries these factors."""

    def __init__(self, target: str, source: str) -> None:
        super().__init__(
            f"{target} cannot be tied to {source}: they are adapted apart from each other. Apply "
            f"with tied='together', or call lora_param.bake(model) or lora_param.remove(model) "
            f"first."
        )


class NotPretrainedError(ModelError):
    """A model that has no save_pretrained that takes a state dict."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"{model} has no save_pretrained(directory, state_dict=...) as transformers' models "
            f"have. Write lora_param.merged_state_dict(model) yourself, or save a baked copy: "
            f"lora_param.bake(copy.deepcopy(model))."
        )


class VerificationError(ModelError):
    """An adapter that does not train as it should.

    Attributes:
        failures: names of the checks that failed.
    """

    def __init__(
        self, failures: Mapping[str, tuple[str, str, Sequence[str]]], checked: int
    ) -> None:
        told = [
            f"{check}: {found}, expected {expected}" + (f" ({listed(names)})" if names else "")
            for check, (found, expected, names) in failures.items()
        ]
        super().__init__(f"{len(failures)} of {checked} checks failed: {'; '.join(told)}.")
        self.failures = tuple(failures)


# --- adapters ---------------------------------------------------------------------------------


class AdapterError(UserError, ValueError):
    """An adapter, or its fit to a base, is not right."""


class NoAdapterError(AdapterError):
    """No adapter of that name."""

    def __init__(self, name: str | None, existing: Sequence[str]) -> None:
        what = "no adapter" if name is None else f"no adapter named {name!r}"
        have = f"it has {listed(existing)}" if existing else "it has none"
        super().__init__(f"{what} on this model; {have}.")


class AdapterExistsError(AdapterError):
    """A second adapter of the same name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the model already has an adapter named {name!r}: choose another name (adapter=...), "
            f"or remove or bake that one first."
        )


class MismatchError(AdapterError):
    """Names or shapes that differ between an adapter and what it should fit."""

    def __init__(
        self,
        adapter: str,
        base: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        shapes: Sequence[str] = (),
        matched: int = 0,
        wanted: int = 0,
    ) -> None:
        parts = [f"{adapter} does not fit {base}: {matched} of {wanted} targets fit."]
        if unexpected:
            parts.append(f"In the adapter alone: {listed(unexpected)}.")
        if missing:
            parts.append(f"In the base alone: {listed(missing)}.")
        if shapes:
            parts.append(f"Different: {listed(shapes)}.")
        super().__init__(" ".join(parts))
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)

    def beside(self, nearest: Sequence[str]) -> MismatchError:
        """The same error, which also names what the base has instead."""
        has = f"The base has, for instance, {listed(nearest)}." if nearest else ""
        told = f"{self.args[0]} {has or 'The base has no weight that LoRA could adapt.'}"
        self.args = (escaped(told),)
        return self


class LayoutError(AdapterError):
    """A target that the base holds in another layout, in which it has no form."""

    def __init__(self, adapter: str, key: str, why: str) -> None:
        super().__init__(f"{adapter} cannot be written for this base: {key} is {why}.")
        self.key = key


class FingerprintError(AdapterError):
    """Same names and shapes, but another base than the adapter was made on."""

    def __init__(self, adapter: str, base: str, differing: Sequence[str]) -> None:
        super().__init__(
            f"{adapter} was made on another base than {base}: the fingerprint differs for "
            f"{listed(differing)}. Give the base it was made on, or override the check with "
            f"{worded('check_fingerprint=False', '--ignore-fingerprint')}."
        )


class UnsettledError(AdapterError):
    """A file that leaves open what only its base, or its owner, can tell.

    Args:
        adapter: which adapter.
        names: the weights that it is about.
        what: what is not told of them.
        give: what to give, so that it is; the base, unless there is more to say.
    """

    def __init__(self, adapter: str, names: Iterable[str], what: str, give: str = "") -> None:
        give = give or f"give the base ({worded('base=', '--base MODEL')})"
        super().__init__(f"{adapter} does not say {what} (of {listed(names)}): {give}.")


class NoFormError(AdapterError):
    """Something that a format, or this package, has no form for.

    Args:
        adapter: which adapter.
        what: what is in it.
        why: the form that is missing.
        instead: what to do.
    """

    def __init__(self, adapter: str, what: str, why: str, instead: str) -> None:
        super().__init__(f"{adapter} has {what}, {why}: {instead}.")


class ResumeError(AdapterError):
    """A training state of another base than the model has."""

    def __init__(self, name: str, here: str, there: str) -> None:
        super().__init__(
            f"the state dict was saved on another base: the frozen weight of {name} has the "
            f"fingerprint {there!r} there, and {here!r} in this model. Load the base that it was "
            f"trained on, apply the adapter, then resume."
        )


class NoDifferenceError(AdapterError):
    """Two checkpoints between which no adapter leads."""

    def __init__(self, tuned: str, base: str, others: Sequence[str]) -> None:
        rest = f"; what differs is {listed(others)}" if others else ""
        super().__init__(f"no matrix of {tuned} differs from {base}{rest}. Nothing was written.")


class VariantError(AdapterError):
    """An operation on updates of another form than it knows."""

    def __init__(self, what: str, adapter: str, key: str, variant: str) -> None:
        super().__init__(
            f"{what} works on updates of the form scale·(B @ A); {key} of {adapter} is {variant}. "
            f"Bake it, and extract the difference."
        )


class UnchangedError(AdapterError):
    """A bake that would change nothing, although targets are enabled."""

    def __init__(self, adapters: Iterable[str], targets: int, *, lost: bool) -> None:
        what = f"{targets} enabled target{'s' * (targets != 1)} of {listed(adapters)}"
        why = (
            f"the updates of {what} are too small for the stored dtype; give a wider one "
            f"({worded('dtype=torch.float32', '--dtype float32')})"
            if lost
            else f"the updates of {what} are still zero; train the adapter first"
        )
        super().__init__(
            f"no element would change: {why}, or disable the adapter to write the base's weights. "
            f"Nothing was written."
        )


class QuantizationLossError(AdapterError):
    """A bake into quantized weights that would lose more than half of an update."""

    def __init__(self, kept: Sequence[tuple[str, float]], targets: int) -> None:
        worst = sorted(kept, key=lambda item: item[1])
        shown = listed([f"{name} ({share:.0%})" for name, share in worst])
        plain = worded("quantized='dense'", "--as dense")
        super().__init__(
            f"quantizing again keeps less than half of the update of {len(kept)} of {targets} "
            f"targets: {shown}. Nothing was written. Write plain weights ({plain}), or "
            f"accept it ({worded('force=True', '--force')})."
        )


class NonFiniteError(AdapterError):
    """NaN or infinity where numbers are needed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} holds NaN or infinite values; nothing was written.")


# --- files ------------------------------------------------------------------------------------


class FileError(UserError, OSError):
    """Reading or writing went wrong."""

    def __str__(self) -> str:
        return str(self.args[0])  # OSError would show its arguments as errno and message


class MissingFileError(FileError):
    """A path that is not there."""

    def __init__(self, path: object, accepted: str) -> None:
        super().__init__(f"{path} does not exist; accepted: {accepted}.")


class BrokenFileError(FileError):
    """A file whose content is not what its name says."""

    def __init__(self, path: object, found: str) -> None:
        super().__init__(f"{path} cannot be read: {found}.")
        self.strerror = found  # so that whoever wraps an OSError says the same


class UnsafePickleError(FileError):
    """A pickle that would run code when opened."""

    def __init__(self, path: object, needs: str) -> None:
        super().__init__(
            f"{path} needs code to be run when it is opened ({needs}), and is refused. "
            f"In a place where you trust the file, load it with its own program, keep its state "
            f"dict alone, and save that with safetensors.torch.save_file."
        )


class UnknownFileError(FileError):
    """A file or directory of no known kind."""

    def __init__(self, path: object, found: str, accepted: str) -> None:
        super().__init__(f"{path} is {found}; accepted: {accepted}.")


class OutputError(FileError):
    """An output that cannot, or must not, be written."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} was not written: {reason}.")
