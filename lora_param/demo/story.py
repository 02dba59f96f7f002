"""The story: train, find the weakest digit, adapt, train the adapter, switch, save, bake."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lora_param.checkpoint.open import open_checkpoint
from lora_param.demo.folder import prepare_folder
from lora_param.demo.page import Page, accuracy_table
from lora_param.errors import InternalError, OptionError
from lora_param.files.safetensors import StreamEntry, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_param.demo.training import Accuracy

__all__ = ["DEFAULT_FOLDER", "DemoResult", "run"]

DEFAULT_FOLDER = "lora-param-demo"

_EPOCHS = 3  # few enough that some digit is still read badly
_LOSS = 0.12
_STEPS = 200


@dataclass(frozen=True)
class DemoResult:
    """What the demo did and measured.

    Attributes:
        folder: where the files are.
        digit: the one that the net read worst, on which the adapter was trained.
        parameters: elements of the base.
        trainable: elements of the factors.
        percent: trainable of the base, in percent.
        steps: optimizer steps on the factors.
        before, on, off, baked: accuracy on the test images at each stage, in percent.
        off_is_before: the logits with the adapter off are those before it, bit for bit.
        baked_is_on: every prediction of the baked net is that with the adapter on.
        weights_equal: each baked weight is what the adapted weight read as, bit for bit.
        files_equal: base file + adapter file, baked as files, are the live bake, bit for bit.
        reloaded_equal: base file + adapter file, loaded into a new net, give the same logits.
        difference: greatest difference of a logit, baked against on.
        seconds: how long it took.
    """

    folder: Path
    digit: int
    parameters: int
    trainable: int
    percent: float
    steps: int
    before: Accuracy
    on: Accuracy
    off: Accuracy
    baked: Accuracy
    off_is_before: bool
    baked_is_on: bool
    weights_equal: bool
    files_equal: bool
    reloaded_equal: bool
    difference: float
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """All of it as plain data, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def run(
    folder: str | os.PathLike[str] = DEFAULT_FOLDER,
    *,
    seed: int = 0,
    console: Console | None = None,
) -> DemoResult:
    """Tell the whole story on a digit net, with real digits, in a few seconds.

    Trains the net, finds the digit it reads worst, registers rank-1 LoRA on its three weights,
    trains only that on only that digit, and shows the accuracy with the adapter on, off and baked.
    Each step prints the call that does it. The files that it leaves work with every command.

    Args:
        folder: where to leave them; made, or overwritten where an earlier demo wrote it.
        seed: of the net, the order of training, and the factors; the same story on the same
            machine, but for rounding. torch's own random state is as before afterwards.
        console: where to print; the terminal where None.

    Returns:
        What was done and measured.

    Raises:
        OptionError: the seed is beyond 64 bits.
        OutputError: the folder holds something else, or cannot be written.
        InternalError: something that always holds did not, such as off being the base.

    Example:
        >>> run("lora-param-demo", seed=1).trainable  # doctest: +SKIP
        6794
    """
    import torch

    if not 0 <= seed < 2**64:
        raise OptionError("seed", seed, "a whole number from 0 to 2**64 - 1")
    path = Path(folder)
    prepare_folder(path)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        result = _tell(path, Page(console or Console()))
    broken = [
        name
        for name in ("off_is_before", "baked_is_on", "weights_equal", "files_equal")
        if not getattr(result, name)
    ]
    if broken:
        raise InternalError(f"the demo found that {', '.join(broken)} does not hold")
    return result


def _tell(folder: Path, page: Page) -> DemoResult:
    import torch

    import lora_param as lp
    from lora_param.demo.data import load_digits
    from lora_param.demo.net import digit_net
    from lora_param.demo.training import measure, predict, train_base, train_until

    start = time.perf_counter()
    digits = load_digits()
    base_file, adapter_file, baked_file = (
        folder / f"{name}.safetensors" for name in ("base", "adapter", "baked")
    )

    page.step("A digit net, trained on the spot")
    model = digit_net()
    size = sum(p.numel() for p in model.parameters())
    page.say(f"784 → 1000 → 2000 → 10, {size:,} parameters")
    with page.progress("training", _EPOCHS) as tick:
        train_base(model, digits.train, digits.train_labels, epochs=_EPOCHS, tick=tick)
    logits_before = predict(model, digits.test)
    before = measure(logits_before, digits.test_labels)
    digit = before.worst
    page.say(
        f"{_EPOCHS} epochs on {len(digits.train)} images: it reads {before.all:.1f} % of "
        f"{len(digits.test)} others."
    )
    page.say(f"It is worst at the digit {digit}: {before.digits[digit]:.1f} %.", strong=True)
    _save_base(model, base_file)
    page.say(f"Its weights are in {base_file}.")

    page.step("LoRA of rank 1 on its three weights")
    page.call('lp.apply(model, "all-linear", rank=1, alpha=1)')
    lp.apply(model, "all-linear", rank=1, alpha=1)
    fresh = torch.equal(predict(model, digits.test), logits_before)
    page.call("print(lp.stats(model))")
    stats = lp.stats(model)
    page.show_stats(stats)
    page.check(fresh, "fresh: the logits are those before it, bit for bit")

    page.step(f"Training the factors on the digit {digit} alone")
    page.call("torch.optim.Adam(lp.parameters(model), lr=5e-4)")
    chosen = digits.train_labels == digit
    with page.progress("training", None) as tick:
        steps = train_until(
            model,
            lp.parameters(model),
            digits.train[chosen],
            digits.train_labels[chosen],
            loss=_LOSS,
            steps=_STEPS,
            tick=tick,
        )
    logits_on = predict(model, digits.test)
    on = measure(logits_on, digits.test_labels)
    page.say(
        f"{steps} steps on {int(chosen.sum())} images. Of the digit {digit} it now reads "
        f"{on.digits[digit]:.1f} % instead of {before.digits[digit]:.1f} %."
    )
    page.call(f'lp.save(model, "{adapter_file}")')
    lp.save(model, adapter_file)

    page.step("Off and on again")
    page.call("with lp.disabled(model): ...")
    with lp.disabled(model):
        logits_off = predict(model, digits.test)
    off_is_before = torch.equal(logits_off, logits_before)
    page.check(off_is_before, "off: the logits are those before it, bit for bit")
    page.check(
        torch.equal(predict(model, digits.test), logits_on),
        "on again: the logits are as trained, bit for bit",
    )
    page.call(f'lp.load(fresh_model, "{adapter_file}")')
    reloaded = lp.load(_load_base(digit_net(), base_file), adapter_file)
    reloaded_equal = torch.equal(predict(reloaded, digits.test), logits_on)
    page.check(reloaded_equal, "both files in a new net: the same logits")

    page.step("Baked in")
    page.call("lp.bake(model)")
    adapted = _read_weights(model)
    lp.bake(model)
    weights_equal = all(map(torch.equal, adapted, _read_weights(model)))
    page.check(weights_equal, "plain modules; each weight is W + ΔW, bit for bit")
    logits_baked = predict(model, digits.test)
    baked_is_on = torch.equal(logits_baked.argmax(1), logits_on.argmax(1))
    difference = (logits_baked - logits_on).abs().max().item()
    bound = 10.0 ** math.ceil(math.log10(difference)) if difference else 0.0
    page.check(baked_is_on, f"each prediction as with it on; logits within {bound:.0e}")
    page.command("bake", str(base_file), str(adapter_file), "-o", str(baked_file))
    lp.bake_checkpoint(base_file, adapter_file, baked_file, force=True)
    files_equal = _holds(baked_file, model)
    page.check(files_equal, "the baked file is the baked net, bit for bit")

    page.step("Accuracy on the test images, in percent")
    off, baked = measure(logits_off, digits.test_labels), measure(logits_baked, digits.test_labels)
    stages = {"before": before, "LoRA on": on, "LoRA off": off, "baked": baked}
    page.show(accuracy_table(stages, digit))
    seconds = time.perf_counter() - start
    page.say(_cost(before, on))
    page.say(f"{seconds:.1f} seconds.")

    page.step("Try next")
    for command in _next_commands(base_file, adapter_file, folder):
        page.command(*command)
    return DemoResult(
        folder,
        digit,
        size,
        stats.trainable,
        stats.percent,
        steps,
        before,
        on,
        off,
        baked,
        off_is_before,
        baked_is_on,
        weights_equal,
        files_equal,
        reloaded_equal,
        difference,
        seconds,
    )


def _cost(before: Accuracy, on: Accuracy) -> str:
    """What training on one digit alone did to the others."""
    falls = [b - o for b, o in zip(before.digits, on.digits, strict=True)]
    most = max(range(10), key=falls.__getitem__)
    if falls[most] <= 0:
        return "No other digit lost by it."
    return (
        f"Trained on one digit alone, it forgets: the digit {most} lost most, "
        f"{before.digits[most]:.0f} to {on.digits[most]:.0f} %."
    )


def _next_commands(base: Path, adapter: Path, folder: Path) -> Sequence[Sequence[str]]:
    return [
        ("stats", str(base), str(adapter)),
        ("disable", str(adapter), "-t", "fc2"),
        ("bake", str(base), str(adapter), "-o", str(folder / "without-fc2.safetensors")),
        ("apply", str(base), "-t", "fc1", "-r", "4", "-o", str(folder / "new.safetensors")),
    ]


def _save_base(model: nn.Module, path: Path) -> None:
    entries: dict[str, StreamEntry] = {
        name: ("F32", tuple(tensor.shape), tensor.clone)
        for name, tensor in model.state_dict().items()
    }
    write_safetensors(path, entries, {"format": "pt"})


def _read_weights(model: nn.Module) -> list[Tensor]:
    """What each linear layer's weight reads as."""
    from torch import nn

    return [m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.Linear)]


def _load_base(model: nn.Module, path: Path) -> nn.Module:
    with open_checkpoint(path) as checkpoint:
        model.load_state_dict(dict(checkpoint))
    return model


def _holds(path: Path, model: nn.Module) -> bool:
    """The file holds exactly the model's state dict, bit for bit."""
    import torch

    mine = model.state_dict()
    with open_checkpoint(path) as checkpoint:
        return set(checkpoint) == set(mine) and all(
            torch.equal(mine[name], tensor) for name, tensor in checkpoint.items()
        )
