"""`hf://` places: what is cached without a network, the rest from a server that speaks as the Hub.

huggingface_hub reads where its cache and the Hub are when it is imported: each case is a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import trained
from safetensors.torch import save_file
from served import Handler, serving

import lora_param as lp
from lora_param.checkpoint.create import create_adapter

pytest.importorskip("huggingface_hub")

COMMIT, OLD = "0123456789abcdef" * 2 + "01234567", "f" * 40


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.q_proj.weight": torch.randn(256, 512, generator=g) for i in range(4)}


def write_model(folder: Path, seed: int = 0) -> None:
    (folder / "more").mkdir(parents=True)
    names = list(model())
    for number, half in enumerate((names[:2], names[2:])):
        save_file({n: model(seed)[n] for n in half}, folder / f"model-{number}.safetensors")
    home = {n: f"model-{int(n in names[2:])}.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(model(seed), folder / "more/model.safetensors")


def cache(home: Path, repository: str, source: Path, commit: str, branch: str | None) -> None:
    """The layout of the Hub's cache: blobs, snapshots that link to them, and refs."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    for path in source.rglob("*"):
        if path.is_file():
            blob = folder / "blobs" / f"{commit[:8]}{len(list(folder.rglob('*')))}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = folder / "snapshots" / commit / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    if branch:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)


@pytest.fixture
def files(tmp_path) -> Path:
    """A model and an adapter for it, in the cache as `o/model` and `o/adapter`, and here."""
    write_model(tmp_path / "model")
    _, fresh = create_adapter(tmp_path / "model", ["q_proj"], rank=2, seed=0)
    (tmp_path / "adapter").mkdir()
    lp.write_adapter(trained(fresh), tmp_path / "adapter/adapter.safetensors")
    cache(tmp_path / "home", "o/model", tmp_path / "model", COMMIT, "main")
    cache(tmp_path / "home", "o/adapter", tmp_path / "adapter", COMMIT, "main")
    return tmp_path


EACH = """
import json, sys
from lora_param.cli.commands import app
from lora_param.cli.terminal import run
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    status = run(app)
    print(f"\\nstatus {status}", file=sys.stderr)
"""


def run(folder: Path, *arguments: str, hub: str | None = None, status: int = 0) -> str:
    """The command's output, or what it said where it fails; without a Hub to ask, offline."""
    done = process(folder, "-m", "lora_param", *arguments, hub=hub)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def run_each(folder: Path, *commands: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """Statuses of commands that are run offline in one process, and what they said."""
    done = process(folder, "-c", EACH, json.dumps(commands))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    statuses = [int(line.split()[1]) for line in lines if line.startswith("status ")]
    return statuses, [line for line in lines if not line.startswith("status ")]


def process(folder: Path, *arguments: str, hub: str | None = None) -> Any:
    here = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    here |= {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub}
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | here,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "url", ["hf://o/model", "hf://o/model@main", f"hf://o/model@{COMMIT}", "hf://o/model/more"]
)
def test_what_is_cached_needs_no_network(url, files):
    found = json.loads(run(files, "stats", url, "--json"))
    assert found["total"] == sum(W.numel() for W in model().values())


def test_every_command_takes_what_is_cached(files):
    base, adapter = "hf://o/model", "hf://o/adapter/adapter.safetensors"
    statuses, said = run_each(
        files,
        ("bake", base, f"{adapter}=0.5", "-o", "baked"),
        ("apply", base, "-t", "q_proj", "-r", "1", "-o", "made.safetensors"),
        ("stats", base, adapter),
        ("stats", adapter),
        ("extract", base, "baked", "-r", "2", "-o", "extracted.safetensors"),
        ("combine", f"{adapter}=2", adapter, "-o", "sum.safetensors"),
        ("resize", adapter, "-r", "1", "-o", "small.safetensors"),
        ("convert", adapter, "--to", "native", "--base", base, "-o", "same.safetensors"),
        ("diff", "baked", base, adapter),  # 3: it was baked by half
        ("check", adapter, base, "--for", "vllm"),  # 1: vLLM takes no native adapter
    )
    assert statuses == [0] * 8 + [3, 1], said
    with_path = lp.bake_checkpoint(
        files / "model", {str(files / "adapter/adapter.safetensors"): 0.5}, files / "near"
    )
    assert all(
        (files / "baked" / name).read_bytes() == (files / "near" / name).read_bytes()
        for name in with_path.files
    )


def test_what_is_cached_is_not_written_to(files):
    blobs = {p: p.read_bytes() for p in (files / "home").rglob("*") if p.is_file()}
    statuses, said = run_each(
        files,
        ("disable", "hf://o/adapter/adapter.safetensors"),
        ("bake", "hf://o/model", "hf://o/adapter/adapter.safetensors", "--in-place"),
        ("bake", "model", "adapter/adapter.safetensors", "-o", "hf://o/baked"),
    )
    assert statuses == [1, 1, 1]
    assert len(said) == 3
    assert all("was not written: it is not on this machine" in line for line in said)
    assert blobs == {p: p.read_bytes() for p in (files / "home").rglob("*") if p.is_file()}


def test_what_is_not_cached_is_one_sentence_without_network(files):
    urls = ("hf://o/other", "hf://o/model@v2", "hf://o/model/nothing.safetensors")
    statuses, said = run_each(files, *(("stats", url) for url in urls))
    assert statuses == [1, 1, 1]
    for url, line in zip(urls, said, strict=True):
        assert f"{url} cannot be read: it is not in the cache" in line
    (files / f"home/hub/models--o--model/snapshots/{COMMIT}/model-1.safetensors").unlink()
    assert "not in the cache" in run(files, "stats", "hf://o/model", status=1)


def test_what_is_no_name_of_a_repository_is_told(files):
    statuses, said = run_each(files, ("stats", "hf://o/na me"), ("stats", "hf://o"))
    assert statuses == [1, 1]
    assert "hf://o/na me cannot be read: Repo id must use" in said[0]
    assert "hf://o cannot be read" in said[1]


def test_without_the_package_one_sentence():
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; import lora_param as lp\n"
        "try: lp.stats('hf://o/model')\n"
        "except lp.UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "hf://o/model needs huggingface_hub, which is not installed: "
        "pip install 'lora_param[hub]'.\n"
    )


class Hub(Handler):
    """What the Hub answers of `o/model` and `o/adapter`, whose folders are served."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        folder = self.server.folder / self.path.split("/")[4]
        self.json([self.entry(folder, p) for p in asked["paths"] if (folder / p).exists()])

    def entry(self, folder: Path, path: str) -> dict[str, object]:
        if (folder / path).is_dir():
            return {"type": "directory", "path": path, "oid": "d" * 40, "size": 0}
        size = (folder / path).stat().st_size
        return {"type": "file", "path": path, "oid": "b" * 40, "size": size}

    def answer(self, *, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.server.folder / parts[3]
            if not folder.exists():
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            elif parts[4:5] == ["tree"]:
                below = folder.joinpath(*parts[6:])
                names = [str(p.relative_to(folder)) for p in sorted(below.iterdir())]
                self.json([self.entry(folder, name) for name in names])
            else:
                self.json({"id": f"o/{parts[3]}", "sha": COMMIT, "siblings": []})
            return
        assert parts[2:4] == ["resolve", COMMIT]
        self.send_file(self.server.folder.joinpath(parts[1], *parts[4:]), body=body)

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, True)


def test_what_is_not_cached_is_read_from_the_hub_by_ranges(files):
    (files / "home").rename(files / "elsewhere")
    with serving(files, Hub) as hub:
        for url in ("hf://o/model", "hf://o/model/more/model.safetensors"):
            found = json.loads(run(files, "stats", url, "--json", hub=hub.url))
            assert found["total"] == sum(W.numel() for W in model().values())
            assert found["total"] == found["base"]
        assert 0 < hub.sent < 300_000 < sum(W.numel() * 4 for W in model().values())
        adapter = "hf://o/adapter/adapter.safetensors"
        run(files, "bake", "hf://o/model@main", adapter, "-o", "baked", hub=hub.url)
        lp.bake_checkpoint(files / "model", files / "adapter/adapter.safetensors", files / "near")
        for near in (files / "near").rglob("*.*"):
            far = files / "baked" / near.relative_to(files / "near")
            assert far.read_bytes() == near.read_bytes()
        said = run(files, "stats", "hf://o/nothing", hub=hub.url, status=1)
        assert "hf://o/nothing does not exist" in said


def test_the_hub_is_asked_whether_the_cache_is_up_to_date(files):
    with serving(files, Hub) as hub:
        hub.sent = 0
        run(files, "stats", "hf://o/model", hub=hub.url)
        assert hub.sent < 1000  # which commit it is at: the cache has that
        refs = files / "home/hub/models--o--model/refs/main"
        refs.write_text(OLD)
        snapshots = files / "home/hub/models--o--model/snapshots"
        (snapshots / COMMIT).rename(snapshots / OLD)
        run(files, "stats", "hf://o/model", hub=hub.url)
        assert hub.sent > 1000
    run(files, "stats", "hf://o/model", hub=hub.url)  # it is gone: what is known counts
