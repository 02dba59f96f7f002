"""Models as people have them: transformers' own, a small CNN; trained, saved, loaded, baked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import EFFICIENTNET, MINILM, find_asset, need
from tiny_models import MODELS, batch, gpt2, logits, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_param as lp
from lora_param.cli.commands import app

# transformers asks of torch what torch is about to drop, and says so at import and when it saves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapted(kind: str) -> nn.Module:
    build, patterns = MODELS[kind]
    model = build()
    torch.manual_seed(1)
    return lp.apply(model, patterns, rank=2, alpha=4)


# --- the laws on real architectures -----------------------------------------------------------


def test_the_whole_story(kind: str, adapted: nn.Module, tmp_path: Path) -> None:
    build, _ = MODELS[kind]
    plain = build()
    base = {n: p.detach().clone() for n, p in plain.state_dict().items()}
    assert torch.equal(logits(adapted), logits(plain)), "fresh"
    losses = train(adapted)
    assert losses[-1] < losses[0]
    after = lp.base_state_dict(adapted)
    assert list(after) == list(base)
    assert all(torch.equal(after[n], base[n]) for n in base), "only the factors changed"
    assert not lp.stats(adapted).dead
    on = logits(adapted)
    assert not torch.equal(on, logits(plain))
    with lp.disabled(adapted):
        frozen = build().requires_grad_(False)
        assert torch.equal(logits(adapted), logits(frozen)), "disabled"
    path = tmp_path / "adapter.safetensors"
    lp.save(adapted, path)
    loaded = lp.load(build(), path)
    assert torch.equal(logits(loaded), on), "saved and loaded"
    merged = lp.merged_state_dict(adapted)
    live = lp.bake(copy.deepcopy(adapted))
    assert all(torch.equal(live.state_dict()[n], merged[n]) for n in merged)
    torch.testing.assert_close(logits(live), on, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(lp.remove(adapted)), logits(build()))


def test_saved_by_transformers(kind: str, adapted: nn.Module, tmp_path: Path) -> None:
    """`save_pretrained(state_dict=merged)`, and a file bake of the saved base, are one."""
    build, _ = MODELS[kind]
    build().save_pretrained(tmp_path / "base")
    train(adapted)
    lp.save(adapted, tmp_path / "adapter.safetensors")
    merged = lp.merged_state_dict(adapted)
    adapted.save_pretrained(tmp_path / "live", state_dict=dict(merged))  # emptied by it
    live = type(build()).from_pretrained(tmp_path / "live")
    assert set(live.state_dict()) == set(merged)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, merged[name]), name
    torch.testing.assert_close(logits(live), logits(adapted), rtol=1e-4, atol=1e-5)
    lp.bake_checkpoint(
        tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "baked", verify=True
    )
    baked = type(build()).from_pretrained(tmp_path / "baked")
    for name, tensor in baked.state_dict().items():
        assert torch.equal(tensor, merged[name]), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_between_file_and_model(kind: str, tmp_path: Path) -> None:
    """An adapter made for the file loads on the model, and one made on the model fits the file."""
    build, patterns = MODELS[kind]
    build().save_pretrained(tmp_path / "base")
    made = tmp_path / "made.safetensors"
    command = [str(tmp_path / "base"), "-r2", "-o", str(made), "--seed", "0"]
    for pattern in patterns:
        command += ["-t", pattern]
    app(["apply", *command], standalone_mode=False)
    model = lp.load(build(), made)
    train(model)
    lp.save(model, tmp_path / "trained.safetensors")
    stats = lp.stats(tmp_path / "base", tmp_path / "trained.safetensors")
    assert stats.rows
    assert not stats.dead
    live = {row.target: row.update_norm for row in lp.stats(model).rows}
    assert {row.target: row.update_norm for row in stats.rows} == pytest.approx(live)


def test_counts_are_those_of_the_weights(kind: str, adapted: nn.Module) -> None:
    build, _ = MODELS[kind]
    stats = lp.stats(adapted)
    assert stats.base == sum(p.numel() for p in build().parameters())
    trains = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert stats.trainable == trains == sum(p.numel() for p in lp.parameters(adapted))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(adapted: nn.Module, reentrant: bool) -> None:
    """Every factor gets its gradient, the same as without."""
    torch.manual_seed(0)
    for p in lp.parameters(adapted):
        nn.init.normal_(p, std=0.05)
    adapted.train()
    adapted(**batch()).loss.backward()
    want = [p.grad.clone() for p in lp.parameters(adapted)]
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted(**batch()).loss.backward()
    for p, g in zip(lp.parameters(adapted), want, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g)


def test_reentrant_checkpointing_of_frozen_inputs_is_loud() -> None:
    """The dead adapter of many reports: torch warns of it, and `stats` shows it afterwards."""
    torch.manual_seed(0)
    net = lp.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], rank=2)
    optimizer = torch.optim.AdamW(lp.parameters(net), lr=1e-2)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        hidden = checkpoint(net[0], torch.randn(2, 4), use_reentrant=True)
    net[1](hidden).sum().backward()
    optimizer.step()
    assert [row.target for row in lp.stats(net).dead] == ["0.weight"]
    hidden = checkpoint(net[0], torch.randn(2, 4).requires_grad_(), use_reentrant=True)
    net[1](hidden).sum().backward()
    optimizer.step()
    assert not lp.stats(net).dead


def test_autocast(adapted: nn.Module) -> None:
    adapted.train()
    optimizer = torch.optim.AdamW(lp.parameters(adapted), lr=2e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lp.parameters(adapted))


def test_a_bfloat16_model(kind: str) -> None:
    build, patterns = MODELS[kind]
    model = lp.apply(build().bfloat16(), patterns, rank=2)
    assert torch.equal(logits(model), logits(build().bfloat16()))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in lp.parameters(model))
    merged = lp.merged_state_dict(model)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}


def test_generate(adapted: nn.Module, kind: str) -> None:
    def tokens(model: nn.Module) -> list[int]:
        model.eval()
        prompt = torch.tensor([[1, 2, 3]])
        more: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)[0].tolist()

    plain = tokens(MODELS[kind][0]())
    assert tokens(adapted) == plain
    train(adapted, steps=8, lr=0.1)
    on = tokens(adapted)
    assert on != plain
    with lp.disabled(adapted):
        assert tokens(adapted) == plain
    assert tokens(adapted) == on
    assert tokens(lp.bake(adapted)) == on


# --- tied embeddings --------------------------------------------------------------------------


def test_tied_embeddings(tmp_path: Path) -> None:
    with pytest.raises(lp.UserError, match=r"tied to lm_head\.weight"):
        lp.apply(gpt2(), ["wte"], rank=2)
    gpt2().save_pretrained(tmp_path / "base")
    for choice in ("together", "apart"):
        torch.manual_seed(1)
        model = lp.apply(gpt2(), ["lm_head"], rank=2, tied=choice)  # type: ignore[arg-type]
        losses = train(model)
        assert losses[-1] < losses[0]
        wte, head = model.transformer.wte, model.lm_head
        assert torch.equal(wte.weight + 0, head.weight + 0) == (choice == "together")
        on = logits(model)
        lp.save(model, tmp_path / f"{choice}.safetensors")
        assert torch.equal(logits(lp.load(gpt2(), tmp_path / f"{choice}.safetensors")), on)
        lp.bake(model)
        torch.testing.assert_close(logits(model), on, rtol=1e-4, atol=1e-5)
        assert (wte.weight is head.weight) == (choice == "together")


def test_a_tie_that_the_file_does_not_hold(tmp_path: Path) -> None:
    """transformers stores a tied head once: apart from it cannot be baked into such a file."""
    gpt2().save_pretrained(tmp_path / "base")
    together = lp.apply(gpt2(), ["wte", "lm_head"], rank=2)
    train(together)
    lp.save(together, tmp_path / "t.safetensors")
    lp.bake_checkpoint(tmp_path / "base", tmp_path / "t.safetensors", tmp_path / "out")
    baked = type(together).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(baked), logits(together), rtol=1e-4, atol=1e-5)
    apart = lp.apply(gpt2(), ["transformer.wte"], rank=2, tied="apart")
    train(apart)
    lp.save(apart, tmp_path / "a.safetensors")
    with pytest.raises(lp.UserError, match=r"apart from lm_head\.weight"):
        lp.bake_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


# --- real weights -----------------------------------------------------------------------------


@pytest.mark.assets
def test_minilm(tmp_path: Path) -> None:
    folder = find_asset(*MINILM)
    need("transformers")
    from transformers import AutoModel

    def load(path: Path = folder) -> nn.Module:
        return AutoModel.from_pretrained(path).eval()

    def embed(model: nn.Module) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 9000, (4, 12), generator=g)
        return model(ids, torch.ones_like(ids)).last_hidden_state.mean(1)

    model = lp.apply(load(), ["query", "value"], rank=8)
    stats = lp.stats(model)
    assert (stats.trainable, stats.base, len(stats.rows)) == (73_728, 22_713_216, 12)
    with torch.no_grad():
        before = embed(load().requires_grad_(False))
        assert torch.equal(embed(model), before)
    optimizer = torch.optim.AdamW(lp.parameters(model), lr=2e-3)
    wanted, losses = before.roll(1, 0), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = 1 - torch.cosine_similarity(embed(model), wanted).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    path = tmp_path / "adapter.safetensors"
    lp.save(model, path)
    with torch.no_grad():
        on = embed(model)
        with lp.disabled(model):
            assert torch.equal(embed(model), before)
        assert torch.equal(embed(lp.load(load(), path)), on)
        merged = lp.merged_state_dict(model)
        lp.bake_checkpoint(folder, path, tmp_path / "baked", sync=False)
        baked = load(tmp_path / "baked")
        for name, tensor in baked.state_dict().items():
            assert torch.equal(tensor, merged[name]), name
        torch.testing.assert_close(embed(baked), on, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "live", state_dict=dict(merged))
        assert torch.equal(embed(load(tmp_path / "live")), embed(baked))


class Stem(nn.Module):
    """The first layers of EfficientNet-Lite0, made by hand, with a head of its own."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        convs = [w for w in weights.values() if w.dim() == 4][:3]
        norms = [n.removesuffix(".running_var") for n in weights if n.endswith(".running_var")][:3]
        layers: list[nn.Module] = []
        for i, (w, norm) in enumerate(zip(convs, norms, strict=True)):
            out, per_group = w.shape[:2]
            channels = 3 if i == 0 else convs[i - 1].shape[0]
            conv = nn.Conv2d(
                channels,
                out,
                w.shape[2:],
                stride=2 if i == 0 else 1,
                padding=w.shape[2] // 2,
                groups=channels // per_group,
                bias=False,
            )
            batch_norm = nn.BatchNorm2d(out)
            conv.load_state_dict({"weight": w})
            batch_norm.load_state_dict(
                {n: weights[f"{norm}.{n}"] for n in batch_norm.state_dict() if "num" not in n},
                strict=False,
            )
            layers += [conv, batch_norm, nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(convs[-1].shape[0], 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


@pytest.mark.assets
def test_real_convolutions() -> None:
    weights = torch.load(find_asset(*EFFICIENTNET), map_location="cpu", weights_only=True)
    torch.manual_seed(0)
    plain = Stem(weights)
    assert any(m.groups > 1 for m in plain.modules() if isinstance(m, nn.Conv2d)), "depthwise"
    model = lp.apply(copy.deepcopy(plain), ["type:Conv2d", "head"], rank=2)
    images = torch.randn(8, 3, 32, 32)
    labels = torch.arange(8) % 4
    optimizer = torch.optim.Adam(lp.parameters(model), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not lp.stats(model).dead
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.shape == conv.parametrizations.weight.original.shape


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)
    )


def test_batch_norm_statistics() -> None:
    """Training moves running statistics, which are buffers: the adapter holds none of them."""
    plain = cnn()
    model = lp.apply(cnn(), ["0", "4"], rank=2)
    images, labels = torch.randn(9, 1, 8, 8), torch.arange(9) % 3
    optimizer = torch.optim.Adam(lp.parameters(model), lr=1e-2)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    model.train()
    losses = [step() for _ in range(6)]
    assert losses[-1] < losses[0]
    state = lp.base_state_dict(model)
    moved = {n for n, t in plain.state_dict().items() if not torch.equal(state[n], t)}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    # With the statistics put back, or kept in the first place, disabled is the base.
    model.load_state_dict(plain.state_dict())
    model[1].eval()
    step()
    model.eval()
    plain.requires_grad_(False).eval()
    with torch.no_grad(), lp.disabled(model):
        assert torch.equal(model(images), plain(images))
