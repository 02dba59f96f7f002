"""What reaches the terminal, a pipe and the shell: signals, odd names, JSON errors, widths."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_samples import Cli, fill, small_weights, snapshot
from safetensors.torch import save_file

import lora_param as lp
from lora_param.files.writer import replace_file

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
from lora_param.cli import main
main()
"""


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own, its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "lora_param", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


# --- 21: signals ------------------------------------------------------------------------------

SLOW = """
import sys, threading
from lora_param.checkpoint.merging import Merging
merge, first = Merging.merge, threading.Lock()
def slow(self, *arguments, **named):
    if first.acquire(blocking=False):
        print("midway", flush=True)
    sys.stdin.readline()  # until the signal is sent
    return merge(self, *arguments, **named)
Merging.merge = slow
from lora_param.cli import main
main()
"""


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "pickle"])
@pytest.mark.parametrize(
    ("number", "sentence"),
    [(signal.SIGTERM, "terminated."), (signal.SIGINT, "interrupted.")],
    ids=["SIGTERM", "SIGINT"],
)
def test_21_signals_clean_up_and_are_said(
    number: signal.Signals, sentence: str, kind: str, as_json: bool, here: Path
) -> None:
    if kind == "directory":
        (here / "m").mkdir()
        save_file(small_weights(), here / "m/model.safetensors")
    model = {"file": "m.safetensors", "directory": "m", "pickle": "m.pt"}[kind]
    before = snapshot(here)
    out = {"file": "o.safetensors", "directory": "o", "pickle": "o.pt"}[kind]
    arguments = ["bake", model, "a.safetensors", "-o", out, *["--json"] * as_json]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        cwd=here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "midway\n"
        assert snapshot(here) != before, "it is writing"
        process.send_signal(number)
        shown, said = process.communicate()  # closes its input
    assert process.returncode == 128 + number
    if as_json:
        assert json.loads(shown) == {"error": sentence}
        assert said == ""
    else:
        assert (shown, said) == ("", f"Error: {sentence}\n")
    assert snapshot(here) == before, "nothing is left"


def test_21_an_interrupt_at_any_moment_is_one_sentence(here: Path) -> None:
    before = snapshot(here)
    for moment in (0.25, 0.5, 0.8, 1.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_param", "bake", "m.pt", "a.safetensors", "-o", "o.pt"],
            cwd=here,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        (here / "o.pt").unlink(missing_ok=True)
        assert snapshot(here) == before
        if process.returncode == 130:
            assert said == "Error: interrupted.\n"


# --- 22: names that steer a terminal ----------------------------------------------------------

STEERING = ["\x1b]0;owned\x07", "\x1b[2J", "\r", "\b\b", "\x9b31m", "‮", "\x7f", "\n"]


def assert_harmless(*texts: str) -> None:
    for text in texts:
        assert not [c for c in text if c != "\n" and not c.isprintable()], repr(text)


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_22_control_characters_in_names_of_weights(cli: Cli, text: str) -> None:
    weights = {f"{text}.weight": torch.ones(4, 4), "other.weight": torch.ones(4, 4)}
    torch.save(weights, "odd.pt")
    save_file({**weights, f"h{text}{text}.bias": torch.ones(4)}, "odd.safetensors")
    for model in ("odd.pt", "odd.safetensors"):
        done = [
            cli("stats", model),
            cli("stats", model, "--json"),
            cli("apply", model, "-r", 1, "--dry-run"),
            cli("apply", model, "-r", 1, "-o", "odd-a.safetensors", "--force"),
            cli("apply", model, "-t", "nothing", "--dry-run"),
            cli("stats", model, "odd-a.safetensors"),
            cli("bake", "m.safetensors", "odd-a.safetensors", "-o", "o.safetensors"),
            cli("disable", "odd-a.safetensors", "-t", "other"),
            cli("bake", model, "odd-a.safetensors", "-o", f"o{Path(model).suffix}", "--force"),
        ]
        fill(Path("odd-a.safetensors"))
        done.append(
            cli("bake", model, "odd-a.safetensors", "-o", f"o{Path(model).suffix}", "--force")
        )
        assert_harmless(*(d.out + d.err for d in done))
        assert [d.status for d in done] == [0, 0, 0, 0, 1, 0, 1, 0, 1, 0], done
        named = {w["name"] for w in json.loads(done[1].out)["weights"]}
        assert named >= set(weights), "JSON has the names themselves"
        assert repr(text)[1:-1] in done[0].out


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_22_control_characters_in_names_of_files(cli: Cli, text: str) -> None:
    model, adapter, out = (f"{x}{text}.safetensors" for x in "maô")
    Path(model).write_bytes(Path("m.safetensors").read_bytes())
    done = [
        cli("stats", f"none{text}"),
        cli("apply", model, "-t", "fc1", "-r", 1, "-o", adapter),
        cli("apply", model, "-t", "fc1", "-r", 1, "-o", adapter),
        cli("stats", model, adapter),
        cli("stats", model, adapter, "--json"),
        cli("disable", adapter, "-t", f"x{text}"),
        cli("bake", model, adapter, "-o", out),
        cli("bake", model, adapter, "-o", out, "--bad" + text),
    ]
    fill(Path(adapter))
    done.append(cli("bake", model, adapter, "-o", out))
    assert_harmless(*(d.out + d.err for d in done))
    assert [d.status for d in done] == [1, 0, 1, 0, 0, 1, 1, 2, 0], done


def test_22_a_name_of_a_file_that_is_no_text(cli: Cli) -> None:
    model = f"m{os.fsdecode(bytes([255]))}.safetensors"
    Path(model).write_bytes(Path("m.safetensors").read_bytes())
    for arguments, status in (
        (["stats", model], 0),
        (["stats", model, "--json"], 0),
        (["apply", model, "-t", "fc1", "-r", 1, "-o", f"a{model}"], 0),
        (["stats", f"none{model}"], 1),
    ):
        done = cli(*arguments)
        assert done.status == status, done
        assert "\\udcff" in done.out + done.err
        assert_harmless(done.out, done.err)


def test_22_lone_surrogates_in_names_of_weights(cli: Cli) -> None:
    torch.save({"\ud800.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}, "odd.pt")
    shown = cli("stats", "odd.pt")
    assert (shown.status, "\\ud800.weight" in shown.out) == (0, True)
    data = cli("stats", "odd.pt", "--json")
    assert json.loads(data.out)["weights"][0]["name"] == "\ud800.weight"
    done = cli("apply", "odd.pt", "-r", 1, "-o", "x.safetensors")
    assert (done.status, "no Unicode text" in done.err) == (1, True), done
    assert cli("apply", "odd.pt", "-t", "b", "-r", 1, "-o", "x.safetensors").status == 0


# --- 22: a full disk --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--dtype", "float64"]], ids=["same", "cast"])
@pytest.mark.parametrize("kind", ["file", "directory", "side file", "pickle", "in place"])
def test_22_a_full_disk_names_the_output(kind: str, options: list[str], tmp_path: Path) -> None:
    weights = {f"{n}.weight": torch.ones(64, 64) for n in "abcdefgh"}
    model = tmp_path / "base.safetensors"
    save_file(weights, model)
    lp.apply_checkpoint(model, ["a"], tmp_path / "a.safetensors", rank=1)
    fill(tmp_path / "a.safetensors")
    out: Path = tmp_path / "out.safetensors"
    if kind == "pickle":
        model, out = tmp_path / "base.pt", tmp_path / "out.pt"
        torch.save(weights, model)
    elif kind in ("directory", "side file"):
        (tmp_path / "base").mkdir()
        size = 64 if kind == "directory" else 1
        small = {k: v[:size, :64].contiguous() for k, v in weights.items()}
        save_file(small, tmp_path / "base/model.safetensors")
        model, out = tmp_path / "base", tmp_path / "out"
        lp.apply_checkpoint(model, ["a"], tmp_path / "a.safetensors", rank=1, force=True)
        fill(tmp_path / "a.safetensors")
        if kind == "side file":
            (model / "tokenizer.json").write_bytes(bytes(200_000))
    where = ["--in-place"] if kind == "in place" else ["-o", str(out)]
    if kind == "in place":
        out = model
    before = snapshot(tmp_path)
    arguments = [model, tmp_path / "a.safetensors", *where, *options]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "60000", "bake", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(out) in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert ".tmp" not in done.stderr
    assert snapshot(tmp_path) == before


def test_22_errors_of_what_was_just_written_name_the_output(tmp_path: Path) -> None:
    from lora_param.errors import BrokenFileError

    with pytest.raises(BrokenFileError) as caught, replace_file(tmp_path / "out") as file:
        raise BrokenFileError(file.name, "it is damaged")
    assert str(caught.value) == f"{tmp_path / 'out'} cannot be read: it is damaged."


# --- 22: errors as JSON -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["stats", "none"], 1),
        (["stats", "m.safetensors", "--norms=7"], 2),
        (["stats"], 2),
        (["frobnicate"], 2),
        (["apply", "m.safetensors", "-t", "none", "--dry-run"], 1),
        (["enable", "m.safetensors"], 1),
        (["bake", "m.safetensors", "none", "-o", "o.safetensors"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_22_errors_are_json_with_json(cli: Cli, arguments: list[str], status: int) -> None:
    text, data = cli(*arguments), cli(*arguments, "--json")
    assert text.status == data.status == status
    assert text.out == data.err == ""
    error = json.loads(data.out)
    assert list(error) == ["error"]
    assert text.err == f"Error: {error['error']}\n"


def test_22_json_after_two_dashes_is_a_name(cli: Cli) -> None:
    done = cli("stats", "--", "--json")
    assert done.out == ""
    assert done.err.startswith("Error: --json does not exist")


def test_22_a_bug_of_ours_and_an_interrupt_are_json_too(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, status, says in (
        (ZeroDivisionError("x"), 70, "internal error: ZeroDivisionError: x"),
        (KeyboardInterrupt(), 130, "interrupted."),
    ):

        def broken(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(lp, "stats", broken)
        done = cli("stats", "m.safetensors", "--json")
        assert (done.status, done.err) == (status, "")
        assert says in json.loads(done.out)["error"]
        assert cli("stats", "m.safetensors").err.startswith("Error: " + says[:12])


def test_22_a_full_standard_output_is_said(here: Path) -> None:
    for options in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "lora_param", "stats", "m.safetensors", *options],
                cwd=here,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.stderr.startswith("Error: No space left on device.\n")
        assert "Traceback" not in done.stderr
        assert done.returncode != 0


# --- 22: completion ---------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_22_shell_completion(tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    script = bin_ / "lora-param"
    script.write_text(f"#!{sys.executable}\nfrom lora_param.cli import main\nmain()\n")
    script.chmod(0o755)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("_LORA")},
        "HOME": str(tmp_path),
        "PATH": f"{bin_}:{os.environ['PATH']}",
    }

    def bash(text: str) -> str:
        done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout

    # a command after it keeps bash from making way for it: the shell is found by the parents
    assert "installed" in bash("lora-param --install-completion; true")
    assert "lora-param" in (tmp_path / ".bashrc").read_text()
    complete = (
        "source ~/.bashrc; COMP_WORDS=({}); COMP_CWORD={}; "
        '$(complete -p lora-param | sed "s/.*-F \\([^ ]*\\).*/\\1/") lora-param; '
        'echo "${{COMPREPLY[@]}}"'
    )
    assert bash(complete.format("lora-param st", 1)).split() == ["stats"]
    assert bash(complete.format("lora-param bake --ver", 2)).split() == ["--verify"]
    assert bash("lora-param --show-completion; true").startswith("_lora_param_completion() {")


# --- 22: widths -------------------------------------------------------------------------------


def test_22_long_paths_are_whole_in_a_pipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    folder = here / "-".join(["a rather long name"] * 8)
    folder.mkdir()
    model, adapter = folder / "m.safetensors", folder / "a.safetensors"
    name = ".".join(["encoder_with_a_long_name"] * 5) + ".weight"
    save_file({name: torch.ones(4, 4), "x.weight": torch.ones(4, 4)}, model)
    out = folder / "o.safetensors"
    for width in ("40", "80"):
        for arguments in (
            ["apply", model, "-r", 1, "-o", adapter, "--force"],
            ["stats", model, adapter],
            ["bake", model, adapter, "-o", out, "--force"],
        ):
            done = command(*arguments, COLUMNS=width)
            assert done.returncode == 0, done.stderr
            shown = str(arguments[-2] if arguments[0] != "stats" else model)
            for word in shown.split():
                assert word in done.stdout, (width, arguments)
            assert name in done.stdout
            fill(adapter)
        done = command("stats", folder / "none.safetensors", COLUMNS=width)
        assert done.stderr.startswith(f"Error: {folder}/none.safetensors does not exist; ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["", "apply", "stats", "enable", "disable", "bake", "demo"])
@pytest.mark.parametrize("width", [40, 60])
def test_22_help_is_readable_when_narrow(
    cli: Cli, name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = cli(*[name] * bool(name), "--help")
    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= width
    assert "…" not in done.out, "nothing is cut"
    assert not re.search(r"[^\]}]\.\.\.", done.out)
    monkeypatch.setenv("COLUMNS", "200")
    whole = cli(*[name] * bool(name), "--help").out
    words = " ".join(done.out.split())
    for sentence in ("Print one JSON document instead of text.", "Replace an output that exists."):
        assert (sentence in whole) == (sentence in words)
    if not name:
        assert "apply Register LoRA on chosen weights: print the plan, write the adapter." in words


# --- 22: an empty header ----------------------------------------------------------------------


def test_22_an_empty_header_is_a_checkpoint_without_weights(cli: Cli) -> None:
    Path("e.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    done = cli("stats", "e.safetensors")
    assert (done.status, done.err) == (0, "")
    assert "0 weights" in done.out
    assert "target" not in done.out
    assert "adapter" not in done.out
    assert json.loads(cli("stats", "e.safetensors", "--json").out)["weights"] == []
    assert "a checkpoint without weights" in cli("enable", "e.safetensors").err
    assert "matches none of 0 weights" in cli("apply", "e.safetensors", "--dry-run").err
