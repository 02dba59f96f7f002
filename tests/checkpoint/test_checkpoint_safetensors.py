import json
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_samples import weights
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.errors import BrokenFileError, MissingFileError, OutputError
from lora_param.files.header import DTYPES, MAX_HEADER, read_header
from lora_param.files.safetensors import NAMES, write_safetensors
from lora_param.fingerprint import tensor_base_weight


def file_of(path: Path, header: str | bytes, data: bytes = b"\0" * 4, length: int | None = None):
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)})


ONE = entry()
REJECTED = {
    "metadata number": f'{{"__metadata__":{{"a":1}},"x":{ONE}}}',
    "metadata list": f'{{"__metadata__":["a"],"x":{ONE}}}',
    "metadata null value": f'{{"__metadata__":{{"a":null}},"x":{ONE}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"x":{ONE}}}',
    "lower-case dtype": f'{{"x":{entry("f32")}}}',
    "unknown dtype": f'{{"x":{entry("F128")}}}',
    "float shape": '{"x":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
    "negative shape": '{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "minus zero": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
    "bool shape": '{"x":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "three offsets": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}',
    "no offsets": '{"x":{"dtype":"F32","shape":[1]}}',
    "no shape": '{"x":{"dtype":"F32","data_offsets":[0,4]}}',
    "dtype twice": '{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "hole": f'{{"x":{entry(offsets=(4, 8))}}}',
    "overlap": f'{{"x":{ONE},"y":{ONE}}}',
    "reversed": f'{{"x":{entry(shape=(0,), offsets=(4, 0))}}}',
    "size": f'{{"x":{entry(shape=(2,))}}}',
    "overflow": f'{{"x":{entry(shape=(2**40, 2**40))}}}',
    "half a byte": f'{{"x":{entry("F4", (1,), (0, 1))}}}',
    "past the end": f'{{"x":{entry(shape=(2,), offsets=(0, 8))}}}',
    "trailing bytes": "{}",
    "array": "[]",
    "NaN": '{"x":NaN}',
    "empty": "",
    "bom": "\ufeff{}",
    "nul padding": f'{{"x":{ONE}}}\0',
    "surrogate": f'{{"\\ud800":{ONE}}}',
    "null entry": '{"x":null}',
    "deep": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"y":'
    + "[" * 200
    + "]" * 200
    + "}}",
}
ACCEPTED = {
    "plain": f'{{"x":{ONE}}}',
    "spaces": f' \n{{"x":{ONE}}}\t\r',
    "metadata null": f'{{"__metadata__":null,"x":{ONE}}}',
    "metadata key twice": f'{{"__metadata__":{{"a":"1","a":"2"}},"x":{ONE}}}',
    "unknown field": '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":[1e3,null]}}',
    "zero size": f'{{"x":{ONE},"y":{entry(shape=(0, 3), offsets=(4, 4))}}}',
    "scalar": f'{{"":{entry(shape=())}}}',
    "any order": f'{{"y":{entry("U8", (2,), (2, 4))},"x":{entry("F16", (1,), (0, 2))}}}',
}


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_with_one_sentence(name, tmp_path):
    path = file_of(tmp_path / "x.safetensors", REJECTED[name])
    assert not reference_accepts(path)
    with pytest.raises(BrokenFileError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts_what_the_reference_accepts(name, tmp_path):
    path = file_of(tmp_path / "x.safetensors", ACCEPTED[name])
    assert reference_accepts(path)
    header = read_header(path)
    with safe_open(path, "np") as file:
        assert sorted(header.entries) == sorted(file.keys())
        assert header.metadata == (file.metadata() or {})


def test_a_tensor_twice_is_refused_although_the_reference_takes_it(tmp_path):
    path = file_of(tmp_path / "x.safetensors", f'{{"x":{ONE},"x":{ONE}}}')
    assert reference_accepts(path)
    with pytest.raises(BrokenFileError, match="'x' twice"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "limit"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not UTF-8 at byte 8"),
    ],
)
def test_rejects_what_comes_before_the_header(content, why, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert not reference_accepts(path)
    with pytest.raises(BrokenFileError, match=why):
        read_header(path)


def test_missing_file(tmp_path):
    with pytest.raises(MissingFileError):
        SafetensorsCheckpoint(tmp_path / "none.safetensors")


BASE_HEADER = (
    f'{{"__metadata__":{{"format":"pt"}},"a":{entry("F32", (2, 1), (0, 8))},'
    f'"b":{entry("BF16", (3,), (8, 14))},"c":{entry("I8", (2,), (14, 16))}}}'
)


@draws(300)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(BASE_HEADER)),
            st.integers(0, 2),
            st.sampled_from(
                [*'{}[]",:0123456789-.e ', "", "\n", "F", "null", "\\u0041", "é", "\0"]
            ),
        ),
        max_size=3,
    ),
    cut=st.integers(-2, 2),
)
def test_mutated_headers_fare_as_with_the_reference(tmp_path, edits, cut):
    text = BASE_HEADER
    for position, removed, inserted in edits:
        text = text[:position] + inserted + text[position + removed :]
    path = file_of(tmp_path / "x.safetensors", text, bytes(16 + cut))
    try:
        read_header(path)
        ours, why = True, ""
    except BrokenFileError as error:
        ours, why = False, str(error)
    if ours != reference_accepts(path):
        # What alone we are stricter about: names that are there twice.
        assert not ours, text
        assert "twice" in why, (text, why)


def test_reads_lazily_and_as_the_reference(base):
    with SafetensorsCheckpoint(base) as checkpoint:
        assert set(checkpoint) == set(weights())
        assert checkpoint.weights["a.v.weight"].dtype == "bfloat16"
        assert checkpoint.metadata == {"format": "pt", "note": "é"}
        for name, tensor in weights().items():
            assert torch.equal(checkpoint[name], tensor)
            assert checkpoint[name].dtype == tensor.dtype
            array = checkpoint.array(name)
            assert array.dtype == np.float32
            assert np.array_equal(array, tensor.float().numpy())
            assert checkpoint.base_weight(name) == tensor_base_weight(tensor)


def test_fingerprint_sees_values_and_does_not_depend_on_strides(base, tmp_path):
    checkpoint = SafetensorsCheckpoint(base)
    tensor = weights()["a.q.weight"]
    strided = tensor.t().contiguous().t()
    assert not strided.is_contiguous()
    assert tensor_base_weight(strided) == checkpoint.base_weight("a.q.weight")
    assert tensor_base_weight(tensor + 1).hash != checkpoint.base_weight("a.q.weight").hash
    assert tensor_base_weight(tensor.to("meta")).hash is None
    assert checkpoint.fingerprint(["nothing", "bias"]).keys() == {"bias"}
    large = torch.arange(100_000.0).reshape(1000, 100)
    save_file({"large": large, "none": torch.empty(0, 3)}, tmp_path / "l.safetensors")
    other = SafetensorsCheckpoint(tmp_path / "l.safetensors")
    assert other.base_weight("large") == tensor_base_weight(large)
    assert other.base_weight("none") == tensor_base_weight(torch.empty(0, 3))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64", "bool", "int64"])
def test_fingerprint_of_other_dtypes(dtype, tmp_path):
    tensor = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path / "x.safetensors")
    assert checkpoint.base_weight("x") == tensor_base_weight(tensor)
    if dtype != "complex64":
        assert np.array_equal(checkpoint.array("x"), tensor.float().numpy())


def test_quantized_storage_is_named(tmp_path):
    tensors = {
        "q.weight": torch.zeros(2, 2),
        "q.weight_scale": torch.ones(1),
        "v.weight": torch.ones(2, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = SafetensorsCheckpoint(tmp_path / "x.safetensors").weights
    assert found["q.weight"].packed == "quantized: q.weight_scale is stored beside it"
    assert found["v.weight"].packed == ""


def test_a_file_that_changed_under_us_is_refused(base):
    checkpoint = SafetensorsCheckpoint(base)
    base.write_bytes(base.read_bytes() + b" ")
    with pytest.raises(BrokenFileError, match="changed"):
        checkpoint["bias"]


def stream(tensors):
    return {
        n: (NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), lambda t=t: t)
        for n, t in tensors.items()
    }


def test_writes_what_the_reference_reads_and_in_its_order(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    size = write_safetensors(ours, stream(weights()), {"format": "pt"})
    save_file(weights(), theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_size == size
    shuffled = dict(reversed(list(weights().items())))
    buffers = [BytesIO(), BytesIO()]
    write_safetensors(buffers[0], stream(weights()), {"a": "1", "b": "2"})
    write_safetensors(buffers[1], stream(shuffled), {"b": "2", "a": "1"})
    assert buffers[0].getvalue() == buffers[1].getvalue()


def test_writer_refuses_what_no_reader_takes(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(OutputError, match="__metadata__"):
        write_safetensors(path, {"__metadata__": ("F32", (1,), lambda: bytes(4))})
    with pytest.raises(OutputError, match="limit"):
        write_safetensors(path, {"x": ("F32", (1,), lambda: bytes(4))}, {"a": "b" * MAX_HEADER})
    with pytest.raises(OutputError, match="3 bytes where 4"):
        write_safetensors(path, {"x": ("F32", (1,), lambda: bytes(3))})
    assert list(tmp_path.iterdir()) == []


def test_dtype_order_is_the_references(tmp_path):
    known = [n for n, (bits, t) in DTYPES.items() if bits == 8 and hasattr(torch, t)]
    tensors = {n: torch.zeros(2, dtype=getattr(torch, DTYPES[n][1])) for n in known}
    save_file(tensors, tmp_path / "x.safetensors")
    assert list(read_header(tmp_path / "x.safetensors").entries) == known[::-1]
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()


def test_headers_arrays_and_fingerprints_need_no_torch(base):
    code = (
        "import sys; from lora_param.checkpoint.open import open_checkpoint;"
        f"c = open_checkpoint({str(base)!r}); c.weights; c.array('a.v.weight');"
        "c.fingerprint(); import lora_param.formats; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
