"""Damaged files, drawn from a seed: what `test_damaged_files.py` feeds to every reader.

A long run: `LORA_PARAM_FUZZ=100000 LORA_PARAM_FUZZ_SEED=7` before `python -m pytest` of it.
"""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save

import lora_param as lp

Bytes = Callable[[random.Random], tuple[str, bytes]]
"""From a generator of random numbers to a file's name and its content."""

INTERESTING = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
WORDS = (
    "F32",
    "BF16",
    "I8",
    "C64",
    "F4",
    "X9",
    "",
    "\x1b[2J",
    "\ud800",
    "‮",
    "x" * 300,
    "__metadata__",
)


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.q.weight": torch.randn(6, 4, generator=g),
        "a.v.weight": torch.randn(6, 4, generator=g).bfloat16(),
        "b.bias": torch.randn(6, generator=g),
        "steps": torch.tensor(3),
    }


# --- what any bytes can suffer -----------------------------------------------------------------


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One to four of: flipped bits, other bytes, cuts, copies, numbers at their limits."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        at = draw.randrange(len(data))
        kind = draw.randrange(9)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + draw.randint(1, 64)]
        elif kind == 4:
            part = data[at : at + draw.randint(1, 64)]
            data[at:at] = part * draw.randint(1, 3)
        elif kind == 5:
            data[at:at] = draw.randbytes(draw.randint(1, 32))
        elif kind == 6:
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(INTERESTING) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
        elif kind == 7:
            to = draw.randrange(len(data))
            data[to : to + 16] = data[at : at + 16]
        else:
            data += draw.randbytes(draw.randint(1, 100))
    return bytes(data)


def odd(draw: random.Random) -> object:
    """A value where another is due."""
    return draw.choice(
        (
            *INTERESTING, *WORDS, -1, -0.0, 1.5, 1e308, float("nan"), None, True, [], {}, [[]],
            [1] * 9,
            {"dtype": "F32"}, [0, 2**40], "weights.safetensors", "../x.pt", "/etc/passwd",
        )
    )  # fmt: skip


def shaken(value: object, draw: random.Random, chance: float = 0.03) -> object:
    """JSON with some of its values, names and lengths changed."""
    if draw.random() < chance:
        return odd(draw)
    if isinstance(value, dict):
        changed: dict[str, object] = {}
        for name, item in value.items():
            if draw.random() < chance / 2:
                continue
            if draw.random() < chance / 2:
                name = draw.choice(WORDS)
            changed[name] = shaken(item, draw, chance)
        if draw.random() < chance:
            changed[draw.choice(WORDS)] = odd(draw)
        return changed
    if isinstance(value, list):
        items = [shaken(item, draw, chance) for item in value]
        return items * draw.choice((0, 2)) if draw.random() < chance else items
    return value


# --- each kind of file -------------------------------------------------------------------------


def safetensors_file(draw: random.Random) -> tuple[str, bytes]:
    whole = save(weights(), {"format": "pt"})
    return "x.safetensors", _safetensors(whole, draw)


def _safetensors(whole: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return damaged(whole, draw)
    (length,) = struct.unpack("<Q", whole[:8])
    text = json.dumps(shaken(json.loads(whole[8 : 8 + length]), draw)).encode()
    if draw.random() < 0.3:
        text = damaged(text, draw)
    said = draw.choice(INTERESTING) if draw.random() < 0.1 else len(text)
    return struct.pack("<Q", said) + text + whole[8 + length :]


def adapter_file(draw: random.Random, whole: bytes) -> tuple[str, bytes]:
    if draw.random() < 0.5:
        return "x-adapter.safetensors", _safetensors(whole, draw)
    (length,) = struct.unpack("<Q", whole[:8])
    tree = json.loads(whole[8 : 8 + length])
    config = json.dumps(shaken(json.loads(tree["__metadata__"]["config"]), draw, 0.01))
    tree["__metadata__"]["config"] = (
        damaged(config.encode(), draw).decode("utf-8", "replace") if draw.random() < 0.3 else config
    )
    text = json.dumps(tree).encode()
    return "x-adapter.safetensors", struct.pack("<Q", len(text)) + text + whole[8 + length :]


def _content(draw: random.Random) -> object:
    own: dict[object, object] = dict(weights())
    kind = draw.randrange(7)
    if kind == 1:
        return {"state_dict": own, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{}]}}
    if kind == 2:
        own["itself"] = own
    if kind == 3:
        shared: object = own
        for _ in range(5):
            shared = {f"k{i}": shared for i in range(20)}
        return shared
    if kind == 4:
        own[draw.choice((1, None, "\ud800", "\x1b[2J", ("a", 1)))] = torch.ones(2, 2)
    if kind == 5:
        own["odd"] = draw.choice(
            (torch.ones(3, 3).to_sparse(), torch.ones(1).expand(9, 9), torch.ones(2, 2) * 1j,
             torch.empty(2, 2, device="meta"), torch.nn.Parameter(torch.ones(2, 2)),
             torch.ones(0, 4))
        )  # fmt: skip
    if kind == 6:
        return draw.choice((OrderedDict(own), [own], own["a.q.weight"], (own, own), "text", None))
    return own


def zip_pickle(draw: random.Random) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    torch.save(_content(draw), buffer)
    if draw.random() < 0.4:
        return "x.pt", damaged(buffer.getvalue(), draw)
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(out, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl") or draw.random() < 0.1:
                content = damaged(content, draw)
            if draw.random() < 0.05:
                continue
            name = (
                info.filename
                if draw.random() > 0.05
                else draw.choice(("x/data.pkl", "a/b", "../x"))
            )
            how = zipfile.ZIP_DEFLATED if draw.random() < 0.05 else zipfile.ZIP_STORED
            if how:
                content += bytes(1_000_000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of two records of one name, which is meant
                archive.writestr(name, content, how)
    return "x.pt", out.getvalue()


def legacy_pickle(draw: random.Random) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    torch.save(_content(draw), buffer, _use_new_zipfile_serialization=False)
    return draw.choice(("x.pt", "x.bin", "x.ckpt")), damaged(buffer.getvalue(), draw)


def index_file(draw: random.Random) -> tuple[str, bytes]:
    tree = {
        "metadata": {"total_size": 200},
        "weight_map": dict.fromkeys(weights(), "weights.safetensors"),
    }
    text = json.dumps(shaken(tree, draw)).encode()
    return "x.safetensors.index.json", damaged(text, draw) if draw.random() < 0.4 else text


def config_file(draw: random.Random) -> tuple[str, bytes]:
    tree = {"model_type": "llama", "torch_dtype": "float32", "hidden_size": 4, "layers": [1, {}]}
    text = json.dumps(shaken(tree, draw)).encode()
    return "model/config.json", damaged(text, draw) if draw.random() < 0.5 else text


@cache
def _distributed() -> tuple[bytes, bytes]:
    """The index and the data of a distributed checkpoint."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process, which is meant
        content = {"model": weights(), "optimizer": {"state": {}}, "step": 3}
        dcp.save(content, checkpoint_id=folder, no_dist=True)
        index, data = Path(folder, ".metadata"), Path(folder, "__0_0.distcp")
        return index.read_bytes(), data.read_bytes()


def distributed_index(draw: random.Random) -> tuple[str, bytes]:
    return "chunks/.metadata", damaged(_distributed()[0], draw)


def distributed_data(draw: random.Random) -> tuple[str, bytes]:
    return "chunked/__0_0.distcp", damaged(_distributed()[1], draw)


def prepare(folder: Path) -> bytes:
    """What the damaged files stand beside; gives the bytes of a whole adapter."""
    (folder / "weights.safetensors").write_bytes(save(weights(), {"format": "pt"}))
    for name in ("model", "chunks", "chunked"):
        (folder / name).mkdir()
    (folder / "chunked/.metadata").write_bytes(_distributed()[0])
    (folder / "chunks/__0_0.distcp").write_bytes(_distributed()[1])
    (folder / "model/model.safetensors").write_bytes(save(weights(), {"format": "pt"}))
    lp.apply_checkpoint(
        folder / "weights.safetensors", ["q", "v"], folder / "whole.safetensors", rank=2, seed=0
    )
    record = lp.read_adapter(folder / "whole.safetensors")
    ones = {name: torch.ones_like(tensor) for name, tensor in record.tensors.items()}
    lp.write_adapter(replace(record, tensors=ones), folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()
