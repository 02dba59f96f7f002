"""Adapted transformers models: `save_pretrained`, the Trainer, tying and resizing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import need
from safetensors.torch import load_file
from tiny_models import MODELS, batch, gpt2, llama, logits, train
from torch import nn

import lora_param as lp

# transformers asks of torch what torch is about to drop, and says so at import and when it saves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TIED = {"together": ["wte", "lm_head", "c_attn"], "apart": ["lm_head", "c_attn"]}


def tied_gpt2(tied: str, variant: str = "lora", init: str = "kaiming") -> Any:
    torch.manual_seed(1)
    settings: Any = {"tied": tied, "variant": variant, "init": init}
    return lp.apply(gpt2(), TIED[tied], rank=2, alpha=4, **settings)


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


# --- the class: of the same name, and gone with the last adapter --------------------------------


def test_the_class_is_its_own_again_after_the_last_adapter() -> None:
    model = gpt2()
    cls, inner = type(model), type(model.transformer)
    lp.apply(model, ["c_attn"], rank=2)
    lp.apply(model, ["c_fc"], rank=2, adapter="second")
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    lp.bake(model, "second")
    assert type(model) is not cls
    lp.remove(model)
    assert type(model) is cls
    assert type(model.transformer) is inner


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = tied_gpt2("together")
    train(model)
    other = copied(model)
    on = logits(model)
    lp.remove(model)
    assert torch.equal(logits(other), on)
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), on)
    assert type(lp.remove(other)) is type(model)


def test_an_instance_of_the_class_is_a_plain_model(tmp_path: Path) -> None:
    model = lp.apply(llama(), rank=2)
    lp.save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is type(llama())


# --- 16: tied embeddings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"variant": "dora"}, {"init": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_tie_weights_leaves_what_is_tied(settings: dict[str, str]) -> None:
    model = tied_gpt2("together", **settings)
    train(model)
    on = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), on)
    with lp.disabled(model):
        model.tie_weights()
    assert torch.equal(logits(model), on)
    head, wte = model.lm_head, model.transformer.wte
    assert head.parametrizations.weight[0] is wte.parametrizations.weight[0]
    with pytest.raises(lp.UserError, match="assigning 'weight' writes into an adapted weight"):
        head.weight = nn.Parameter(torch.zeros(40, 16))
    with pytest.raises(lp.UserError, match="assigning 'weight' writes into an adapted weight"):
        head.weight = lp.apply(gpt2(), ["wte", "lm_head"], rank=2).lm_head.weight


@pytest.mark.parametrize("target", ["lm_head", "transformer.wte"])
def test_tie_weights_of_weights_adapted_apart_is_one_sentence(target: str) -> None:
    model = lp.apply(gpt2(), [target], rank=2, tied="apart")
    before = logits(model)
    with pytest.raises(lp.UserError, match=r"lm_head\.weight cannot be tied to transformer\.wte"):
        model.tie_weights()
    assert torch.equal(logits(model), before)
    lp.remove(model).tie_weights()


@pytest.mark.parametrize("tied", TIED)
def test_resize_token_embeddings_refuses_before_anything_changed(tied: str) -> None:
    model = tied_gpt2(tied)
    train(model)
    on, config, state = logits(model), model.config.to_dict(), copy.deepcopy(model.state_dict())
    for more in ({"new_num_tokens": 50}, {"pad_to_multiple_of": 64}, {"new_num_tokens": 30}):
        with pytest.raises(lp.UserError, match="is adapted, and its factors would not fit it with"):
            model.resize_token_embeddings(**more)
        assert states_equal(model.state_dict(), state)
        assert model.config.to_dict() == config
    assert torch.equal(logits(model), on)
    lp.bake(model).resize_token_embeddings(50, mean_resizing=False)
    assert model.lm_head.weight.shape == (50, 16)


def test_resize_token_embeddings_of_the_same_size_or_not_adapted() -> None:
    model = tied_gpt2("together")
    assert model.resize_token_embeddings(40) is model.transformer.wte
    assert model.resize_token_embeddings(pad_to_multiple_of=8) is model.transformer.wte
    assert model.resize_token_embeddings() is model.transformer.wte
    model = lp.apply(gpt2(), ["c_attn"], rank=2)
    train(model)
    on = logits(model)
    model.resize_token_embeddings(50, mean_resizing=False)
    torch.testing.assert_close(logits(model)[..., :40], on)
    assert model.lm_head.weight is model.transformer.wte.weight


# --- 16: the Trainer ----------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path, steps: int, data: Any = None, **more: Any) -> Any:
    need("accelerate")
    from transformers import Trainer, TrainingArguments

    if data is None:
        data = [{k: v[0] for k, v in batch(i).items()} for i in range(8)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
        **more,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("kind", ["together", "apart", "dora", "llama", "mixtral"])
def test_the_trainer_saves_and_resumes(kind: str, tmp_path: Path) -> None:
    """Four steps, and two that go on from the checkpoint of two, are the same to the bit."""

    def build() -> Any:
        torch.manual_seed(1)
        if kind in MODELS:
            return lp.apply(MODELS[kind][0](), MODELS[kind][1], rank=2, alpha=4)
        return tied_gpt2("together", "dora") if kind == "dora" else tied_gpt2(kind)

    through = build()
    trainer(through, tmp_path, 4).train()
    checkpoint = tmp_path / "checkpoint-2"
    plain = type(lp.remove(build())).from_pretrained(checkpoint)
    resumed = build()
    for factor in lp.parameters(resumed):
        nn.init.constant_(factor, 9.0)  # nothing of this may be left
    again = trainer(resumed, tmp_path / "more", 4)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert states_equal(resumed.state_dict(), through.state_dict())
    assert torch.equal(logits(resumed), logits(through))

    half = build()
    trainer(half, tmp_path / "half", 2).train()
    torch.testing.assert_close(logits(plain), logits(half))
    assert states_equal(plain.state_dict(), lp.merged_state_dict(half))


def test_the_trainer_loads_the_best_model_and_a_head_that_trains(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2))
    lp.apply(model, ["c_attn", "score"], rank=4, freeze=False)
    ids = batch()["input_ids"]
    data = [{"input_ids": ids[i % 2], "labels": torch.tensor(i % 2)} for i in range(8)]
    best_at_end: Any = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, 4, data, **best_at_end)
    run.train()
    own = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(input_ids=ids).logits
        for parameter in model.parameters():
            nn.init.constant_(parameter, 9.0)  # nothing of this may be left
    run._load_best_model()
    assert states_equal(model.state_dict(), own)
    plain = GPT2ForSequenceClassification.from_pretrained(run.state.best_model_checkpoint)
    torch.testing.assert_close(plain(input_ids=ids).logits, want)


def test_a_checkpoint_resumes_on_its_own_base_alone(tmp_path: Path) -> None:
    model = tied_gpt2("together")
    train(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    other = tied_gpt2("together")
    other.transformer.wte.parametrizations.weight.original.data += 0.1
    with pytest.raises(lp.UserError, match="was saved on another base: the frozen weight of trans"):
        other.load_state_dict(dict(state), strict=False)
    more = tied_gpt2("together")
    lp.apply(more, ["c_attn"], rank=2, adapter="second")
    with pytest.raises(lp.UserError, match=r"In the base alone: 1\.lora_A"):
        more.load_state_dict(dict(state), strict=False)
    again = tied_gpt2("together")
    found = again.load_state_dict(dict(state), strict=False)
    assert not found.unexpected_keys
    assert all(n.startswith("lm_head.") for n in found.missing_keys)  # tied: in the file once
    assert torch.equal(logits(again), logits(model))


# --- 17: save_pretrained ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MODELS, *TIED])
def test_save_pretrained_without_a_state_dict_is_right(kind: str, tmp_path: Path) -> None:
    if kind in MODELS:
        build, patterns = MODELS[kind]
        model: Any = lp.apply(build(), patterns, rank=2, alpha=4)
    else:
        model = tied_gpt2(kind)
    train(model)
    own = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert states_equal(again.state_dict(), lp.merged_state_dict(model))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert states_equal(model.state_dict(), own)
    config = gpt2().config if kind in TIED else model.config
    assert again.config.architectures == [type(gpt2() if kind in TIED else build()).__name__]
    assert model.config.tie_word_embeddings == config.tie_word_embeddings
    if kind in TIED:
        assert (again.lm_head.weight is again.transformer.wte.weight) == (kind == "together")


def test_save_pretrained_of_a_state_dict_gathered_elsewhere(tmp_path: Path) -> None:
    """As the Trainer gives it under FSDP and DeepSpeed."""
    model = tied_gpt2("together")
    train(model)
    model.save_pretrained(tmp_path / "a", state_dict=copy.deepcopy(model.state_dict()))
    model.save_pretrained(tmp_path / "b")
    assert states_equal(
        load_file(tmp_path / "a" / "model.safetensors"),
        load_file(tmp_path / "b" / "model.safetensors"),
    )


def test_save_pretrained_where_another_parametrization_stands_is_one_sentence(
    tmp_path: Path,
) -> None:
    model = llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    lp.apply(model, ["up_proj"], rank=2)
    saves: Any = (
        model.save_pretrained,
        lambda d: lp.save_pretrained(model, d),
        lambda d: lp.save_pretrained(model, d, merged=False),
    )
    for save in saves:
        with pytest.raises(lp.UserError, match="another parametrization besides LoRA"):
            save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_submodel_is_saved_by_itself(tmp_path: Path) -> None:
    """The model may stand in another, and its parts may be models."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

    outer = lp.apply(Wrapper(), ["q_proj"], rank=2)
    outer.train()
    train(outer.inner)
    outer.inner.save_pretrained(tmp_path / "whole")
    again = type(llama()).from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(again), logits(outer.inner), rtol=1e-4, atol=1e-5)
    outer.inner.model.save_pretrained(tmp_path / "part")
    part = type(llama().model).from_pretrained(tmp_path / "part")
    assert states_equal(part.state_dict(), lp.merged_state_dict(outer.inner.model))


@pytest.mark.parametrize("kind", [*MODELS, *TIED])
def test_lp_save_pretrained_merged(kind: str, tmp_path: Path) -> None:
    """The very files that transformers writes for the plain model that holds W + ΔW."""
    if kind in MODELS:
        build, patterns = MODELS[kind]
        model: Any = lp.apply(build(), patterns, rank=2, alpha=4)
    else:
        model = tied_gpt2(kind)
    train(model)
    assert lp.save_pretrained(model, tmp_path / "merged") == tmp_path / "merged"
    baked = lp.bake(copy.deepcopy(model))
    if kind == "apart":
        baked.config.tie_word_embeddings = False
    baked.save_pretrained(tmp_path / "baked")
    files = sorted(p.name for p in (tmp_path / "baked").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "merged").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(files)
    for name in files:
        same = (tmp_path / "baked" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
        assert same, name
    again = type(baked).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(baked))


@pytest.mark.parametrize("kind", [*MODELS, *TIED])
def test_lp_save_pretrained_base_and_adapter(kind: str, tmp_path: Path) -> None:
    if kind in MODELS:
        build, patterns = MODELS[kind]
        model: Any = lp.apply(build(), patterns, rank=2, alpha=4)
    else:
        build, model = gpt2, tied_gpt2(kind)
    train(model)
    lp.save_pretrained(model, tmp_path / "both", merged=False)
    build().save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert states_equal(load_file(tmp_path / "both" / "model.safetensors"), base)
    again = type(model).from_pretrained(tmp_path / "both")
    assert torch.equal(logits(again), logits(build()))
    lp.load(again, tmp_path / "both" / "adapter.safetensors")
    assert torch.equal(logits(again), logits(model))


def test_lp_save_pretrained_of_several_adapters(tmp_path: Path) -> None:
    model = lp.apply(llama(), ["q_proj"], rank=2)
    lp.apply(model, ["v_proj"], rank=2, adapter="second")
    train(model)
    lp.save_pretrained(model, tmp_path, merged=False)
    again = type(model).from_pretrained(tmp_path)
    for name in ("default", "second"):
        lp.load(again, tmp_path / f"adapter-{name}.safetensors", adapter=name)
    assert torch.equal(logits(again), logits(model))
    lp.apply(model, ["k_proj"], rank=2, adapter="a/b")
    with pytest.raises(lp.UserError, match="'a/b'; accepted: a name that can be part of a file's"):
        lp.save_pretrained(model, tmp_path / "other", merged=False)
    assert not (tmp_path / "other").exists()


def test_lp_save_pretrained_shards_and_half_precision(tmp_path: Path) -> None:
    model = lp.apply(llama().bfloat16(), rank=2)
    train(model)
    lp.save_pretrained(model, tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert states_equal(again.state_dict(), lp.merged_state_dict(model))


def test_lp_save_pretrained_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(lp.UserError, match="no adapter on this model"):
        lp.save_pretrained(llama(), tmp_path / "x")
    net = lp.apply(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(lp.UserError, match="Sequential has no save_pretrained"):
        lp.save_pretrained(net, tmp_path / "x")
    model = lp.apply(llama(), rank=2)
    (tmp_path / "file").write_text("here")
    with pytest.raises(lp.UserError, match="it is a file, not a directory"):
        lp.save_pretrained(model, tmp_path / "file")
    with pytest.raises(lp.UserError, match="was not written"):
        lp.save_pretrained(model, tmp_path / "file" / "below")
    with torch.no_grad():
        lp.parameters(model)[0].fill_(float("nan"))
    for merged in (True, False):
        with pytest.raises(lp.UserError, match="NaN or infinite"):
            lp.save_pretrained(model, tmp_path / "x", merged)
    assert not (tmp_path / "x").exists()


class Hub(nn.Module):
    """A model with a `save_pretrained` of another library, which takes no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def save_pretrained(self, directory: Path) -> None:
        torch.save(self.state_dict(), directory / "model.pt")


def test_another_librarys_save_pretrained_says_what_to_call(tmp_path: Path) -> None:
    model = lp.apply(Hub(), rank=2)
    for save in (model.save_pretrained, lambda d: lp.save_pretrained(model, d)):
        with pytest.raises(lp.UserError, match="Write lora_param"):
            save(tmp_path)
    assert not list(tmp_path.iterdir())
    lp.bake(model).save_pretrained(tmp_path)
    assert list(torch.load(tmp_path / "model.pt")) == ["layer.weight", "layer.bias"]
