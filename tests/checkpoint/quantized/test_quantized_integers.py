"""GPTQ and AWQ, whose libraries need a GPU: against their definitions, element by element."""

from pathlib import Path

import pytest
import torch
from quantized_samples import opened, reads

M, N, GROUP = 16, 64, 32


def words(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Fields of a row, 32 / bits in each word, `order` saying which field lies at which place."""
    per = 32 // bits
    order = order or tuple(range(per))
    packed = torch.zeros(values.shape[0], values.shape[1] // per, dtype=torch.int64)
    for i in range(values.shape[0]):
        for k in range(packed.shape[1]):
            for place, field in enumerate(order):
                packed[i, k] |= int(values[i, per * k + field]) << (bits * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", ["rows", "shuffled", "absent"])
def test_gptq_equals_its_definition(
    bits: int, version: str | None, order: str, tmp_path: Path
) -> None:
    q = torch.randint(0, 2**bits, (N, M))  # inputs, outputs
    shift = 0 if version == "gptq_v2" else 1
    zeros = torch.randint(0, 2**bits, (N // GROUP, M))
    scales = torch.rand(N // GROUP, M).half()
    index = torch.arange(N) // GROUP
    if order == "shuffled":
        index = index[torch.randperm(N)]
    tensors = {
        "l.qweight": words(q.t(), bits).t(),
        "l.qzeros": words(zeros, bits),
        "l.scales": scales,
    } | ({} if order == "absent" else {"l.g_idx": index.int()})
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
    config |= {} if version is None else {"checkpoint_format": version}
    meant = torch.empty(M, N, dtype=torch.float16)
    for o in range(M):
        for i in range(N):
            g = index[i]
            meant[o, i] = scales[g, o] * (q[i, o] - (zeros[g, o] + shift)).half()
    with opened(tmp_path, tensors, config, dtype="float16") as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert set(checkpoint) == {"l.weight"}


def test_gptq_whose_config_lies_in_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {
        "l.qweight": torch.zeros(N // 8, M, dtype=torch.int32),
        "l.qzeros": torch.zeros(1, M // 8, dtype=torch.int32),
        "l.scales": torch.ones(1, M).half(),
    }
    tmp_path.joinpath("quantize_config.json").write_text('{"bits": 4, "group_size": -1}')
    with opened(tmp_path, tensors, dtype="float16") as checkpoint:
        reads(checkpoint, "l.weight", -torch.ones(M, N).half())


def test_awq_equals_its_definition(tmp_path: Path) -> None:
    q = torch.randint(0, 16, (N, M))
    zeros = torch.randint(0, 16, (N // GROUP, M))
    scales = torch.rand(N // GROUP, M).half()
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "l.qweight": words(q, 4, interleaved),
        "l.qzeros": words(zeros, 4, interleaved),
        "l.scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    meant = torch.empty(M, N, dtype=torch.float16)
    for o in range(M):
        for i in range(N):
            g = i // GROUP
            meant[o, i] = scales[g, o] * (q[i, o] - zeros[g, o]).half()
    with opened(tmp_path, tensors, config, dtype="float16") as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert set(checkpoint) == {"l.weight"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "GPTQ of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "shapes do not fit"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "'marlin', which is not read",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "AWQ gemv"),
        ({"quant_method": "vptq"}, "quantized by vptq, which is not read"),
        (None, "quantized"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    config: dict[str, object] | None, why: str, tmp_path: Path
) -> None:
    tensors = {
        "l.qweight": torch.zeros(N // 8, M, dtype=torch.int32),
        "l.qzeros": torch.zeros(2, M // 8, dtype=torch.int32),
        "l.scales": torch.ones(2, M).half(),
    }
    with opened(tmp_path, tensors, config) as checkpoint:
        assert why in checkpoint.weights["l.qweight"].unsuitable
        assert "l.weight" not in checkpoint
