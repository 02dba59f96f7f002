import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lora_param as lp
from lora_param.demo.folder import MARKER
from lora_param.demo.net import digit_net
from lora_param.demo.story import run
from lora_param.errors import OutputError


def tell(folder, width=80, seed=0):
    file = io.StringIO()
    return run(folder, seed=seed, console=Console(file=file, width=width)), file


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    before = torch.random.get_rng_state()
    result, file = tell(tmp_path_factory.mktemp("demo") / "lora-param-demo")
    assert torch.equal(torch.random.get_rng_state(), before)
    return result, file.getvalue()


def test_the_share_is_that_of_the_original(told):
    result, text = told
    assert (result.parameters, result.trainable) == (2_807_010, 6_794)
    assert f"{result.percent:.2f}" == "0.24"
    assert "trainable 6,794 of 2,807,010 (0.24 %)" in text


def test_the_worst_digit_improves_clearly(told):
    result, _ = told
    assert result.digit == result.before.worst
    assert result.before.digits[result.digit] < 92
    assert result.on.digits[result.digit] > result.before.digits[result.digit] + 5
    assert result.on.all > result.before.all - 5  # and the net does not fall apart


def test_off_is_before_and_baked_is_on(told):
    result, text = told
    assert result.off_is_before
    assert result.off == result.before
    assert result.baked_is_on
    assert result.baked == result.on
    assert result.weights_equal
    assert result.files_equal
    assert result.reloaded_equal
    assert result.difference < 1e-4
    assert "NO " not in text


def test_every_step_shows_its_call(told):
    _, text = told
    for call in (
        "lp.apply(",
        "lp.stats(",
        "lp.parameters(",
        "lp.save(",
        "lp.disabled(",
        "lp.load(",
    ):
        assert f">>> {call}" in text or call in text
    assert "$ lora-param bake " in text
    assert "$ lora-param stats " in text


def test_its_files_work(told):
    result, _ = told
    base, adapter, baked = (
        result.folder / f"{n}.safetensors" for n in ("base", "adapter", "baked")
    )
    net = digit_net()
    net.load_state_dict(load_file(base))
    lp.bake(lp.load(net, adapter))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in load_file(baked).items())
    assert lp.stats(base, adapter).trainable == 6_794


def test_its_data_is_json(told):
    data = json.loads(json.dumps(told[0].to_dict()))
    assert data["trainable"] == 6_794
    assert len(data["before"]["digits"]) == 10


def test_lines_fit_but_for_those_to_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, file = tell("lora-param-demo", 60, seed=1)
    for line in file.getvalue().splitlines():
        assert line == line.rstrip()
        assert len(line) <= 60 or line.startswith(("   >>> ", "   $ "))


def test_its_own_folder_is_written_anew_by_the_same_story(told):
    first, _ = told
    second, _ = tell(first.folder)
    assert second.digit == first.digit
    assert second.before.all == pytest.approx(first.before.all, abs=0.5)  # but for rounding
    assert second.on.all == pytest.approx(first.on.all, abs=0.5)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OutputError, match="the demo did not write"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="is a file"):
        run(tmp_path / "thesis.txt")
    with pytest.raises(OutputError):
        run(tmp_path / "thesis.txt" / "below")
    assert not (tmp_path / MARKER).exists()
