"""A corpus of adapters, each rebuilt from a failure that somebody reported, with its verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_param.consumers.facts import gather
from lora_param.consumers.judge import (
    CONSUMERS,
    ITSELF,
    Finding,
    judge,
    load_rulings,
    version_of,
)
from lora_param.errors import BrokenFileError, MissingFileError, OptionError, UnknownFileError
from lora_param.targets.weights import Weight

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]
P = "base_model.model.model.layers.{}.self_attn.{}"


def plain(
    rank: int = 8, modules: tuple[str, ...] = ("q_proj", "v_proj"), layers: int = 2
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors of an adapter that nobody refuses."""
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for module in modules:
            name = P.format(layer, module)
            tensors[f"{name}.lora_A.weight"] = random.normal(size=(rank, 32)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(size=(32, rank)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
    }
    return config, tensors


def set_config(**values: Any) -> Change:
    def change(config: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        config.update(values)

    return change


def without(*fields: str) -> Change:
    def change(config: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        for name in fields:
            del config[name]

    return change


def add(key: str, *shape: int, value: float = 1.0) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[key] = np.full(shape, value, np.float32)

    return change


def drop(key: str) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        del tensors[key]

    return change


def renamed(old: str, new: str) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def both(*changes: Change) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for one in changes:
            one(config, tensors)

    return change


A0 = P.format(0, "q_proj") + ".lora_A.weight"
B0 = P.format(0, "q_proj") + ".lora_B.weight"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
MAGNITUDES = add(P.format(0, "q_proj") + ".lora_magnitude_vector", 32)
WHOLE_HEAD = add("base_model.model.lm_head.weight", 64, 32)
NEW_TOKENS = add("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 3, 32)


@dataclass(frozen=True)
class Failure:
    """One adapter of the corpus.

    Attributes:
        name: what is the matter with it.
        source: where somebody ran into it.
        change: what makes a plain adapter that one.
        expected: consumer → its verdict; those not named accept it.
        says: a part of a finding.
        rank: of the plain adapter.
    """

    name: str
    source: str
    change: Change
    expected: dict[str, str] = field(default_factory=dict)
    says: str = ""
    rank: int = 8


ALL = dict.fromkeys(CONSUMERS, "refused")
IMAGES = {"diffusers": "refused", "comfyui": "refused"}  # a language model's adapter
CPP = {"llama.cpp": "refused", "ollama": "refused"}
CORPUS = [
    Failure("plain", "the reference", set_config(), {}),
    Failure("rank 32", "vllm#9280", set_config(), {"vllm": "refused"}, "--max-lora-rank 32", 32),
    Failure("rank 20", "vllm#22782", set_config(), {"vllm": "refused"}, "--max-lora-rank 32", 20),
    Failure("rank 600", "vllm/config/lora.py", set_config(), {"vllm": "refused"}, "resize", 600),
    Failure(
        "rsLoRA",
        "sglang#40835",
        set_config(use_rslora=True),
        {"sglang": "differs", "llama.cpp": "differs", "ollama": "differs"},
        "4 times too weak",
        16,
    ),
    Failure(
        "alpha pattern",
        "vllm/lora/lora_weights.py",
        set_config(alpha_pattern={"q_proj": 64}),
        {"vllm": "differs", "sglang": "differs", "llama.cpp": "differs", "ollama": "differs"},
        "2 modules have a rank or alpha of their own; one scale, 2,",
    ),
    Failure(
        "DoRA",
        "vllm/lora/peft_helper.py",
        both(set_config(use_dora=True), MAGNITUDES),
        {"vllm": "refused", "sglang": "refused", **CPP},
        "bake MODEL ADAPTER",
    ),
    Failure(
        "a saved head",
        "vllm#9280",
        both(set_config(modules_to_save=["lm_head"]), WHOLE_HEAD),
        {"vllm": "refused", "sglang": "differs", **CPP},
        "base_model.model.lm_head.weight",
    ),
    Failure(
        "biases",
        "FORMATS, section 6",
        both(set_config(bias="all"), add(P.format(0, "q_proj") + ".base_layer.bias", 32)),
        {"vllm": "refused", "sglang": "differs", **CPP},
        "1 biases",
    ),
    Failure(
        "new tokens",
        "peft#2898",
        both(set_config(trainable_token_indices=[1, 2, 3]), NEW_TOKENS),
        {"vllm": "refused", **CPP},
        "rows of 1 embeddings",
    ),
    Failure(
        "experts, one by one",
        "vllm#41384",
        both(
            add(f"{EXPERTS}.0.w1.lora_A.weight", 8, 32),
            add(f"{EXPERTS}.0.w1.lora_B.weight", 16, 8),
            set_config(target_modules=["q_proj", "v_proj", "w1"]),
        ),
        {"vllm": "differs", "sglang": "differs"},
        "updates are of single experts",
    ),
    Failure(
        "experts of the old layout",
        "peft#3165",
        both(
            set_config(target_parameters=["mlp.experts.down_proj"], peft_version="0.18.1"),
            add(f"{EXPERTS}.lora_A.weight", 32, 16),
            add(f"{EXPERTS}.lora_B.weight", 32, 32),
        ),
        {"vllm": "differs", "sglang": "differs", "peft": "refused", "transformers": "refused"},
        "as PEFT did before 0.19.1",
    ),
    Failure(
        "square experts of an unknown PEFT",
        "Automodel#3592",
        both(
            set_config(target_parameters=["mlp.experts.down_proj"]),
            without("peft_version"),
            add(f"{EXPERTS}.lora_A.weight", 32, 32),
            add(f"{EXPERTS}.lora_B.weight", 32, 32),
        ),
        {ITSELF: "differs", "vllm": "differs", "sglang": "differs"},
        "--layout out-in|in-out",
    ),
    Failure(
        "no prefix",
        "vllm#34186, colpali#424",
        renamed("base_model.model.", ""),
        {ITSELF: "differs"},
        "PEFT loads none of them",
    ),
    Failure("B is zero", "unsloth#869", add(B0, 32, 8, value=0.0), {ITSELF: "differs"}, "1 of 4"),
    Failure("NaN", "trl#5975", add(B0, 32, 8, value=float("nan")), {ITSELF: "refused"}, "NaN"),
    Failure("half a pair", "ms-swift#7907", drop(B0), {ITSELF: "refused"}, "q_proj"),
    Failure(
        "two ranks in a pair",
        "unsloth-zoo#779",
        add(B0, 32, 4),
        {ITSELF: "refused"},
        "different ranks",
    ),
    Failure(
        "a rank that the config does not know",
        "tinker-cookbook#533",
        set_config(r=16),
        {ITSELF: "differs"},
        "the config says rank 16, and 4 modules",
    ),
    Failure(
        "no alpha",
        "Megatron-Bridge#5939",
        without("lora_alpha"),
        {ITSELF: "differs", "vllm": "refused", "sglang": "refused", **CPP},
        "lora_alpha",
    ),
    Failure(
        "no target_modules",
        "mlx-lm#1119",
        without("target_modules"),
        {"vllm": "refused", "sglang": "refused"},
        "target_modules",
    ),
    Failure(
        "two conventions",
        "OneTrainer#1563",
        both(
            add("lora_unet_mid_attn.lora_down.weight", 8, 32),
            add("lora_unet_mid_attn.lora_up.weight", 32, 8),
        ),
        {ITSELF: "refused"},
        "another convention",
    ),
    Failure(
        "alpha for the scale",
        "mflux#449",
        set_config(lora_alpha=256),
        {ITSELF: "differs"},
        "up to 32",
    ),
    Failure(
        "patterns that overlap",
        "FORMATS, section 3.5",
        set_config(alpha_pattern={"q_proj": 16, "layers.0.self_attn.q_proj": 16.0}),
        {"peft": "differs", "transformers": "differs"},
        "overlap",
    ),
]


def write(path: Path, failure: Failure) -> Path:
    config, tensors = plain(failure.rank)
    failure.change(config, tensors)
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def verdicts(found: list[Finding]) -> dict[str, str]:
    worst: dict[str, str] = {}
    for f in found:
        if worst.get(f.consumer) != "refused":
            worst[f.consumer] = f.verdict
    return worst


def test_the_corpus_is_large_enough():
    assert len(CORPUS) >= 24
    assert len({f.name for f in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("failure", CORPUS, ids=lambda f: f.name)
def test_corpus(failure, tmp_path):
    facts = gather(write(tmp_path / "adapter", failure))
    found = judge(facts, [c if c != "ollama" else "ollama==0.30" for c in CONSUMERS])
    expected = IMAGES | failure.expected
    assert verdicts(found) == expected
    assert any(failure.says in f.says or failure.says in f.mend for f in found)
    assert all(f.mend and f.source for f in found)


LAYERS = {
    f"model.layers.{i}.self_attn.{m}.weight": Weight("", (32, 32))
    for i in range(2)
    for m in ("q_proj", "v_proj")
}


@pytest.mark.parametrize(
    ("base", "verdict", "says"),
    [
        (LAYERS, {}, ""),
        ({f"text_{n}": w for n, w in LAYERS.items()}, {ITSELF: "refused"}, "4 of 4 modules"),
        ({n.replace("model.l", "language_model.l"): w for n, w in LAYERS.items()}, {}, ""),
        (
            {f"model.layers.{i}.self_attn.qkv_proj.weight": Weight("", (96, 32)) for i in (0, 1)},
            {},
            "",
        ),
        ({n: Weight("", (32, 48)) for n in LAYERS}, {ITSELF: "refused"}, "(32, 48) in the base"),
        (dict(list(LAYERS.items())[:3]), {ITSELF: "refused"}, "layers.1.self_attn.v_proj"),
    ],
    ids=["fits", "another prefix", "a known prefix", "fused", "another width", "one short"],
)
def test_against_a_base(base, verdict, says, tmp_path):
    found = judge(gather(write(tmp_path / "adapter", CORPUS[0]), base))
    assert verdicts(found) == verdict
    assert any(says in f.says for f in found) or not says


def test_versions_decide(tmp_path):
    facts = gather(write(tmp_path / "adapter", CORPUS[0]))
    assert [f.consumer for f in judge(facts, ["ollama==0.34.1"])] == ["ollama"]
    assert judge(facts, ["ollama==0.34.0"]) == []
    old = next(f for f in CORPUS if f.name == "experts of the old layout")
    facts = gather(write(tmp_path / "old", old))
    assert verdicts(judge(facts, ["peft==0.18.1"])) == {}
    assert verdicts(judge(facts, ["peft==0.16.0"])) == {"peft": "refused"}
    assert version_of("0.19.1rc2") == (0, 19, 1)


def test_a_native_adapter_is_read_by_nobody_else(tmp_path):
    import torch

    import lora_param as lp

    model = lp.apply(torch.nn.Linear(8, 8), ["weight"], rank=2, alpha=4)
    lp.save(model, tmp_path / "a.safetensors")
    facts = gather(tmp_path / "a.safetensors")
    assert facts["kind"] == "native"
    assert (facts["max_rank"], facts["max_scale"], facts["dead"]) == (2, 2.0, 1)
    found = judge(facts, ["vllm", "peft"])
    assert verdicts(found) == {ITSELF: "differs", "vllm": "refused", "peft": "refused"}
    mends = {f.consumer: f.mend for f in found}
    assert "convert ADAPTER --to portable" in mends["vllm"]  # what every server takes
    assert "convert ADAPTER --to peft" in mends["peft"]


def test_a_kohya_adapter(tmp_path):
    tensors = {
        "lora_unet_down_blocks_0_attn.lora_down.weight": np.ones((4, 8), np.float32),
        "lora_unet_down_blocks_0_attn.lora_up.weight": np.ones((8, 4), np.float32),
        "lora_unet_down_blocks_0_attn.alpha": np.array(2.0, np.float32),
    }
    save_file(tensors, tmp_path / "k.safetensors")
    facts = gather(tmp_path / "k.safetensors", {"unet.down_blocks.0.attn.weight": Weight("", ())})
    assert (facts["kind"], facts["max_scale"], facts["missing_in_base"]) == ("kohya", 0.5, 0)
    assert verdicts(judge(facts, ["diffusers", "vllm"])) == {"vllm": "refused"}
    facts = gather(tmp_path / "k.safetensors", {"unet.up_blocks.0.attn.weight": Weight("", ())})
    assert facts["missing_in_base"] == 1


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({}, UnknownFileError, "a directory without an adapter"),
        ({"adapter_config.json": "{}"}, UnknownFileError, "without weights"),
        ({"adapter_config.json": "{", "adapter_model.safetensors": ""}, BrokenFileError, "cannot"),
        ({"adapter_config.json": "[]", "adapter_model.safetensors": ""}, BrokenFileError, "a list"),
    ],
)
def test_what_is_no_adapter(files, error, says, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=says):
        gather(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(MissingFileError):
        gather(tmp_path / "none")


def test_a_model_is_no_adapter(tmp_path):
    save_file({"fc.weight": np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(UnknownFileError, match="without factors of any known convention"):
        gather(tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", ["tgi", "vllm==new", "vllm=0.9", "VLLM"])
def test_an_unknown_consumer(text, tmp_path):
    facts = gather(write(tmp_path / "adapter", CORPUS[0]))
    with pytest.raises(OptionError, match=r"vllm, sglang, llama\.cpp"):
        judge(facts, [text])


def test_every_rule_can_be_read_and_names_its_source(tmp_path):
    facts = gather(write(tmp_path / "adapter", CORPUS[0]))
    for r in load_rulings():
        assert set(r.consumers) <= {ITSELF, *CONSUMERS}, r
        assert r.verdict in ("differs", "refused")
        assert r.source
        assert r.mend.format_map(facts)
        assert r.says.format_map(facts)
        r.holds(facts)  # each fact that it asks for is gathered


def test_other_methods_of_peft_are_whole_and_taken_by_peft_alone(tmp_path):
    half = {f"hada_w{i}_{x}": (32, 4) if x == "a" else (4, 32) for i in "12" for x in "ab"}
    tensors = {
        f"{P.format(0, 'q_proj')}.{name}": np.ones(shape, np.float32)
        for name, shape in half.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    findings = judge(gather(tmp_path), CONSUMERS)
    assert not [f for f in findings if f.consumer in (ITSELF, "peft", "transformers")]
    refused = {f.consumer for f in findings if "PEFT's LOHA" in f.says}
    assert refused == {"vllm", "sglang", "llama.cpp", "ollama", "diffusers", "comfyui"}
