from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from rules_samples import (
    check,
    check_derivatives,
    check_functorch,
    clone,
    counting_builds,
    make,
    never_dense,
    normal,
    regions,
    saved_beyond,
)

from lora_param.targets.regions import WHOLE, Region

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
sizes = st.integers(1, 4)
batches = st.sampled_from([(), (1,), (3,)])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@draws(150)
@given(st.data(), st.integers(1, 3), sizes, sizes, batches, st.booleans(), st.booleans())
def test_convolutions(
    data: Any, spatial: int, m: int, n: int, batch: tuple[int, ...], frozen: bool, biased: bool
) -> None:
    kernel = [data.draw(st.integers(1, 2 if spatial == 3 else 3)) for _ in range(spatial)]
    padding = data.draw(st.sampled_from(["valid", "same", 0, 1, (2,) * spatial]))
    stride = 1 if padding == "same" else data.draw(st.sampled_from([1, 2, (2,) * spatial, (1,)]))
    dilation = data.draw(st.sampled_from([1, 2, (1,) * spatial]))
    w = make((m, n, *kernel), data.draw(regions(m, n)), frozen=frozen)
    x, bias = normal(*batch, n, *[6] * spatial), normal(m)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    if biased:
        check(lambda w, x, b: CONV[spatial](x, w, b, **options), w, x, bias)
    else:
        check(lambda w, x: CONV[spatial](x, w, **options), w, x)


@draws(80)
@given(st.data(), st.integers(1, 3), sizes, sizes, batches, st.booleans())
def test_transposed_convolutions(
    data: Any, spatial: int, m: int, n: int, batch: tuple[int, ...], frozen: bool
) -> None:
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    stride = data.draw(st.sampled_from([1, 2, (2,) * spatial]))
    options = {
        "stride": stride,
        "padding": data.draw(st.sampled_from([0, (1,) * spatial])),
        "output_padding": 0 if stride == 1 else data.draw(st.sampled_from([0, 1])),
        "dilation": data.draw(st.sampled_from([1, 2])),
    }
    w = make((m, n, *kernel), data.draw(regions(m, n)), frozen=frozen)
    x, bias = normal(*batch, m, *[4] * spatial), normal(n)
    check(lambda w, x, b: TRANSPOSED[spatial](x, w, b, **options), w, x, bias)


DENSE = {
    "grouped": ((4, 2, 3), lambda w, x: F.conv1d(x, w, groups=2)),
    "depthwise": ((4, 1, 3), lambda w, x: F.conv1d(x, w, groups=4)),
    "transposed grouped": ((4, 2, 3), lambda w, x: F.conv_transpose1d(x, w, groups=2)),
}


@pytest.mark.parametrize("name", DENSE)
def test_grouped_weights_are_built(name: str) -> None:
    shape, operation = DENSE[name]
    check(operation, make(shape, frozen=False), normal(2, 4, 7), lazy=False)


OPERATIONS = {
    "conv1d": ((3, 2, 2), lambda w, x: F.conv1d(x, w, stride=2), (1, 2, 5)),
    "conv2d": ((3, 2, 2, 1), lambda w, x: F.conv2d(x, w, padding="same"), (1, 2, 3, 2)),
    "transposed": ((2, 3, 2), lambda w, x: F.conv_transpose1d(x, w, stride=2), (1, 2, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("region", [WHOLE, Region((1, 2), (0, 1))], ids=["whole", "block"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives(name: str, region: Region) -> None:
    shape, operation, x = OPERATIONS[name]
    w = make(shape, [region], rank=1, frozen=False)
    check_derivatives(operation, w, normal(*x))
    check_functorch(operation, w, normal(*x))


SAVED = {
    "conv1d": ((24, 16, 3), F.conv1d, (2, 16, 6)),
    "conv2d": ((24, 16, 3, 3), F.conv2d, (2, 16, 4, 4)),
    "conv3d": ((24, 16, 2, 2, 2), F.conv3d, (1, 16, 3, 3, 3)),
    "transposed": ((16, 24, 3, 3), F.conv_transpose2d, (1, 16, 3, 3)),
}


@pytest.mark.parametrize("name", SAVED)
def test_no_weight_is_saved_in_training(name: str) -> None:
    shape, conv, x = SAVED[name]
    with counting_builds() as built:
        assert saved_beyond(lambda w, x: conv(x, w), make(shape), normal(*x)) == []
    assert not built


def test_without_gradients_the_cheaper_way() -> None:
    for length, expected in ((4, 0), (400, 1)):
        w = make((8, 8, 3))
        with torch.no_grad(), counting_builds() as built:
            F.conv1d(normal(1, 8, length), w)
        assert len(built) == expected


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "transposed"])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_low_precision(name: str, mode: str) -> None:
    shape, conv, x = SAVED[name]
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    w, x = make(shape, dtype=dtype), normal(*x, dtype=dtype)
    u = w.updates[0]
    exact = w.base.double() + 0.7 * (u.B.double() @ u.A.double()).view(shape)
    expected = conv(x.detach().double(), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), never_dense():
        found = conv(x, clone(w))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=1.0)
    for grad, other in zip(
        torch.autograd.grad(found.double().square().sum(), (u.A, u.B)),
        torch.autograd.grad(expected.square().sum(), (u.A, u.B)),
        strict=True,
    ):
        assert grad.dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), other.flatten(), 0) > 0.99


def test_dropout_acts_on_the_input() -> None:
    w = make((4, 4, 1), dropout=0.5)
    full = 0.7 * (w.updates[0].B @ w.updates[0].A)
    x = torch.eye(4).double()[..., None]  # one channel each
    for conv, delta in ((F.conv1d, full.T), (F.conv_transpose1d, full)):
        found = (conv(x, clone(w)) - conv(x, w.base)).squeeze(-1)
        for row, kept in zip(found, delta, strict=True):
            assert torch.allclose(row, kept * 2) or torch.allclose(row, kept * 0, atol=1e-12)


def test_channels_last() -> None:
    w, x = make((5, 4, 3, 3)), normal(2, 4, 6, 6)
    check(lambda w, x: F.conv2d(x.to(memory_format=torch.channels_last), w), w, x)
