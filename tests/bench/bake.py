"""How long a bake takes and what memory it needs, against a plain copy of the same files.

A bf16 directory of Llama's shape (random weights, all seven projections of each layer adapted at
rank 16), once in four shards and once in one file; `--size` says how large. Contenders, each in a
process of its own, whose imports are not counted, in turns:

- `cp -r`: the directory copied, the baseline;
- `load, merge, save`: each file loaded with `safetensors.torch`, merged in place, and saved;
- `PEFT`: `from_pretrained`, `merge_and_unload` and `save_pretrained`;
- `ours`: `lora_param.bake_checkpoint`, all its checks and the report included, with `sync=False`;
- `cp -r, sync` and `ours, synced`: both until the data are on the disk.

The page cache is warm: the files were just written, and are read once before each turn. In the cold
cases, without those that sync, the kernel is asked to drop what it has of the base before each turn
(it does where the data are on the disk). `GB/s` is of the base's size; `CPU` is the ratio of the
seconds of all cores, which other processes disturb less than the time. `anon MiB` is by how much
the anonymous memory grew at the most, looked at every few milliseconds (pages of mapped files are
the kernel's to drop and do not count); with `--scaled` a base four times as large is measured too.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import truediv
from pathlib import Path

import torch
from common import ALPHA, MIB, PROJECTIONS, Row, options, parse, ratios_of, rotated, show
from safetensors.torch import load_file, save_file

import lora_param as lp

RANK = 16
HIDDEN, INTERMEDIATE, KV, VOCAB = 2048, 5632, 256, 32_000
LAYER = 2 * HIDDEN * (HIDDEN + KV) + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
SHARDS = 4


def cp(folder: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", folder / "base", out], check=True)


def cp_sync(folder: Path, out: Path) -> None:
    cp(folder, out)
    subprocess.run(["sync", *out.iterdir()], check=True)


def load_merge_save(folder: Path, out: Path) -> None:
    factors = load_file(folder / "adapter.safetensors")
    shutil.copytree(
        folder / "base",
        out,
        ignore=lambda _, names: [n for n in names if n[-12:] == ".safetensors"],
    )
    for path in sorted((folder / "base").glob("*.safetensors")):
        weights = load_file(path)
        for name in weights:
            if (A := factors.get(f"{name}.lora_A")) is not None:
                delta = (factors[f"{name}.lora_B"] @ A) * (ALPHA / RANK)
                weights[name] = (weights[name].float() + delta).to(weights[name].dtype)
        save_file(weights, out / path.name, {"format": "pt"})


def peft(folder: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(folder / "peft")).merge_and_unload()
    merged.save_pretrained(out)


def ours(folder: Path, out: Path) -> None:
    lp.bake_checkpoint(folder / "base", folder / "adapter.safetensors", out, sync=False)


def ours_synced(folder: Path, out: Path) -> None:
    lp.bake_checkpoint(folder / "base", folder / "adapter.safetensors", out)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "cp -r": cp,
    "load, merge, save": load_merge_save,
    "PEFT": peft,
    "ours": ours,
    "cp -r, sync": cp_sync,
    "ours, synced": ours_synced,
}


def shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of about `size` MB in bf16."""
    layers = max(round((size * 1e6 / 2 - 2 * VOCAB * HIDDEN) / LAYER), 1)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        rows = {"q": HIDDEN, "k": KV, "v": KV, "o": HIDDEN}
        found |= {f"{at}.self_attn.{n}_proj.weight": (m, HIDDEN) for n, m in rows.items()}
        found |= {f"{at}.mlp.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        found |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make_files(folder: Path, size: int, shards: int) -> None:
    """`base`, `adapter.safetensors`, and the same adapter for PEFT."""
    base, names = folder / "base", shapes(size)
    base.mkdir(parents=True)
    layers = sum(name.endswith("q_proj.weight") for name in names)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": KV // 64,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (base / "config.json").write_text(json.dumps(config))
    every, home = list(names), {}
    step = -(-len(every) // shards)
    for k in range(shards):
        own = every[k * step : (k + 1) * step]
        file = (
            "model.safetensors" if shards == 1 else f"model-{k + 1:05}-of-{shards:05}.safetensors"
        )
        tensors = {n: (torch.randn(names[n]) * 0.02).bfloat16() for n in own}
        save_file(tensors, base / file, {"format": "pt"})
        home |= dict.fromkeys(own, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": home}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = folder / "adapter.safetensors"
    lp.apply_checkpoint(base, PROJECTIONS, adapter, rank=RANK, alpha=ALPHA)
    factors = lp.read_adapter(adapter)
    for tensor in factors.tensors.values():
        tensor.normal_(std=0.01)
    lp.write_adapter(factors, adapter)
    (folder / "peft").mkdir()
    renamed = {}
    for name, tensor in factors.tensors.items():
        module, _, factor = name.rpartition(".weight.")
        renamed[f"base_model.model.{module}.{factor}.weight"] = tensor
    save_file(renamed, folder / "peft" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    settings["target_modules"] = list(PROJECTIONS)
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(settings))


def anonymous() -> int:
    """Bytes of memory that no file is behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def watched(found: list[int]) -> Iterator[None]:
    """Adds by how much anonymous memory grew at the most."""
    before, over = anonymous(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found.append(max(peak, anonymous()) - before)


def cpu_seconds() -> float:
    """Seconds of all cores, of this process and of those that it waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def read_or_drop(path: Path, *, cold: bool) -> None:
    """Have the kernel hold a file's data, or let go of them."""
    with path.open("rb", buffering=0) as file:
        if cold:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while file.read(1 << 24):
            pass


def run_here(way: str, folder: Path, *, cold: bool) -> None:
    """One contender, in this process: prints seconds, bytes, and seconds of all cores."""
    torch.set_num_threads(2)
    lp.bake_checkpoint, lp.read_adapter  # noqa: B018  imported before the clock starts
    import lora_param.checkpoint.output  # noqa: F401

    if way == "PEFT":
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    for path in sorted((folder / "base").iterdir()):
        read_or_drop(path, cold=cold)
    out, found = folder / "out", []
    gc.collect()
    with watched(found):
        start, used = time.perf_counter(), cpu_seconds()
        WAYS[way](folder, out)
        seconds, used = time.perf_counter() - start, cpu_seconds() - used
    print(json.dumps([seconds, found[0], used]))


def run_apart(way: str, folder: Path, *, cold: bool = False) -> tuple[float, float, float]:
    """One contender, in a process of its own: seconds, bytes, and seconds of all cores."""
    line = [sys.executable, __file__, "--worker", way, "--directory", str(folder)]
    line += ["--cold"] * cold
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(folder / "out")
    seconds, peak, used = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak, used


def main() -> None:
    parser = options(__doc__, ["four shards", "one file"], rounds=5)
    parser.add_argument("--size", type=int, default=2100, help="of the base in MB; default: 2100")
    parser.add_argument("--scaled", action="store_true", help="memory at four times the size, too")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--cold", action="store_true", help="the files not in memory, too")
    parser.add_argument("--worker", choices=WAYS, help="internal: run one contender here")
    args = parse(parser)
    if args.worker:
        run_here(args.worker, args.directory, cold=args.cold)
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        for case in args.cases:
            folder, shards = Path(name) / case, SHARDS if case == "four shards" else 1
            make_files(folder, args.size, shards)
            for cold in (False, True) if args.cold else (False,):
                rows += measure(folder, case, args.rounds, cold=cold)
            shutil.rmtree(folder)
        if args.scaled:
            make_files(Path(name) / "large", 4 * args.size, SHARDS)
            seconds, peak, _ = run_apart("ours", Path(name) / "large")
            more = {"anon MiB": peak / MIB}
            rows.append(Row("four times the size", "ours", seconds * 1e3, "ms", None, None, more))
    show("bake", rows, [], as_json=args.json)


def measure(folder: Path, case: str, rounds: int, *, cold: bool) -> list[Row]:
    size = sum(p.stat().st_size for p in (folder / "base").iterdir())
    ways = [way for way in WAYS if not (cold and "sync" in way)]
    times: dict[str, list[float]] = {way: [] for way in ways}
    cores: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0.0)
    for way in rotated(ways, rounds):
        seconds, peak, used = run_apart(way, folder, cold=cold)
        times[way].append(seconds)
        cores[way].append(used)
        peaks[way] = max(peaks[way], peak / MIB)
    more = {
        way: {
            "CPU": statistics.median(map(truediv, cores[way], cores["cp -r"])),
            "GB/s": size / 1e9 / statistics.median(mine),
            "anon MiB": peaks[way],
        }
        for way, mine in times.items()
    }
    rows: list[Row] = []
    for synced in (False, True):
        own = {way: mine for way, mine in times.items() if ("sync" in way) is synced}
        if own:
            name = f"{case}{', cold' * cold}{', synced' * synced}"
            rows += ratios_of(name, own, next(iter(own)), more)
    return rows


if __name__ == "__main__":
    main()
