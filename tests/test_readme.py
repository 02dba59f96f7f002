"""Every block of the README runs, and what is generated in it is fresh."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from readme_commands import README, updated

TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SET_UP = re.compile(r"pip install torch==")


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCKS if kind == language]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_run_in_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    for body in blocks("python"):
        exec(compile(body, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "trainable 6,794 of 2,807,010 (0.24 %)" in printed
    assert "Sequential: 6 of 6 checks passed" in printed
    assert "['blocks.0.in_proj_weight[0:64]', 'blocks.0.in_proj_weight[128:192]'] 1536" in printed
    shell = [line for body in blocks("sh") for line in body.splitlines() if not SET_UP.match(line)]
    assert len(shell) >= 5
    for line in shell:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "lora-param", line
        done = subprocess.run(
            [sys.executable, "-m", "lora_param", *arguments],
            capture_output=True,
            text=True,
            cwd=here,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stderr == ""
    assert (here / "merged.pt").exists()


def test_every_kind_of_block_is_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "sh"}


def test_the_set_up_commands_are_what_ci_takes() -> None:
    lines = [line for line in TEXT.splitlines() if SET_UP.match(line)]
    assert lines == [
        "pip install torch==2.13.0 . && python -m lora_param demo",
        'pip install torch==2.13.0 -e ".[test]" && python -m pytest',
    ]


def test_the_commands_are_fresh() -> None:
    assert updated(TEXT) == TEXT, "run: python tests/readme_commands.py"


def test_lines_of_prose_are_wrapped() -> None:
    prose = re.sub(r"^```.*?^```|<!-- commands.*?/commands -->", "", TEXT, flags=re.DOTALL | re.M)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long
