"""Attention and recurrent networks, whose rules are composed of others."""

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
from torch import Tensor, nn

import lora_param as lp
from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.update import merge

E, HEADS = 4, 2


def attend(w: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention whose packed projection is w (3·E, E)."""
    torch.manual_seed(0)
    eye = torch.eye(E, dtype=q.dtype)
    none = (None, None, False, 0.0, eye, None)
    output, weights = F.multi_head_attention_forward(
        q, k, v, E, HEADS, w, torch.ones(3 * E, dtype=q.dtype), *none, **options
    )
    return output if weights is None else torch.cat([output.flatten(), weights.flatten()])


WAYS = {
    "self": lambda w, x, _, **o: attend(w, x, x, x, **o),
    "encoder-decoder": lambda w, x, y, **o: attend(w, x, y, y, **o),
    "three": lambda w, x, y, **o: attend(w, x, y, y * 2, **o),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "parts",
    [[WHOLE], [Region((0, E)), Region((2 * E, 3 * E))], [Region((2, 7), (1, 3))]],
    ids=["whole", "q and v", "across"],
)
def test_packed_attention(way: str, need_weights: bool, parts: list[Region]) -> None:
    w = make((3 * E, E), parts, frozen=False)
    x, y = normal(3, 2, E), normal(5, 2, E)
    check(lambda w, x, y: WAYS[way](w, x, y, need_weights=need_weights), w, x, y)


def test_separate_projections() -> None:
    q, k, v, out = (make(s, frozen=False) for s in ((E, E), (E, 3), (E, 2), (E, E)))

    def run(*w: Tensor) -> Tensor:
        torch.manual_seed(0)
        x, y = (torch.randn(3, 2, n, dtype=torch.float64) for n in (E, 3))
        return F.multi_head_attention_forward(
            *(x, y, y[..., :2], E, HEADS, None, None, None, None, False, 0.0, w[3], None),
            use_separate_proj_weight=True,
            q_proj_weight=w[0],
            k_proj_weight=w[1],
            v_proj_weight=w[2],
        )[0]

    weights = (q, k, v, out)
    leaves = [t for w in weights for t in (w.base, w.updates[0].A, w.updates[0].B)]
    expected = run(*(merge(w.base, w.updates) for w in weights))
    gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    with never_dense():
        found = run(*weights)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), leaves), gradients)


def test_attention_keeps_no_projection() -> None:
    w, x = make((3 * E, E)), normal(3, 1, E)
    with counting_builds() as built:
        assert saved_beyond(lambda w, x: WAYS["self"](w, x, x, need_weights=False), w, x) == []
    assert not built


def test_attention_dropout_of_the_update() -> None:
    w, x = make((3 * E, E), dropout=0.5), normal(3, 1, E)
    attend(w, x, x, x).sum().backward()  # no warning: the projection shows its input
    assert w.updates[0].A.grad is not None


def test_what_attention_asks_of_torch_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body reads torch's functions as they are now, not as they were when we were imported."""
    called: list[int] = []
    original = F.scaled_dot_product_attention

    def spy(*args: Any, **named: Any) -> Tensor:
        called.append(1)
        return original(*args, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x = normal(3, 2, E)
    attend(make((3 * E, E)), x, x, x, need_weights=False)
    assert called


def test_fused_encoder_kernels_get_built_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    plain.load_state_dict(layer.state_dict())
    lp.apply(layer, ["in_proj_weight", "out_proj", "linear1", "linear2"], rank=2)
    with torch.no_grad():
        for p in lp.parameters(layer):
            p.normal_()
    merged = lp.merged_state_dict(layer)
    plain.load_state_dict(merged)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False] * 3])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
        masked = layer(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding)
        torch.testing.assert_close(masked[0][~padding], masked[1][~padding], rtol=1e-4, atol=1e-5)
        m = layer.self_attn
        arguments = (x, x, x, 8, 2, m.in_proj_weight, m.in_proj_bias)
        found, _ = torch._native_multi_head_attention(
            *arguments, m.out_proj.weight, m.out_proj.bias, need_weights=False
        )
        m = plain.self_attn
        arguments = (x, x, x, 8, 2, m.in_proj_weight, m.in_proj_bias)
        expected, _ = torch._native_multi_head_attention(
            *arguments, m.out_proj.weight, m.out_proj.bias, need_weights=False
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- recurrent --------------------------------------------------------------------------------

H = 3
CELLS = {
    "lstm": (4, lambda w, x, h, v: torch.cat(torch.lstm_cell(x, (h, h * 2), w, v))),
    "lstm bias": (
        4,
        lambda w, x, h, v: torch.lstm_cell(x, (h, h * 2), w, v, v[:, 0], v[:, 1])[0],
    ),
    "gru": (3, lambda w, x, h, v: torch.gru_cell(x, h, w, v)),
    "gru bias": (3, lambda w, x, h, v: torch.gru_cell(x, h, w, v, v[:, 0], v[:, 1])),
    "tanh": (1, lambda w, x, h, v: torch.rnn_tanh_cell(x, h, w, v)),
    "relu": (1, lambda w, x, h, v: torch.rnn_relu_cell(x, h, w, v, v[:, 0], v[:, 0])),
    "hidden": (4, lambda w, x, h, v: torch.lstm_cell(h, (x, x), v, w)[1]),
}


@draws(60)
@given(st.data(), st.sampled_from([*CELLS]), st.integers(1, 5), st.booleans())
def test_cells(data: Any, name: str, batch: int, frozen: bool) -> None:
    gates, operation = CELLS[name]
    m = gates * H
    w = make((m, H), data.draw(regions(m, H)), frozen=frozen)
    check(operation, w, normal(batch, H), normal(batch, H), normal(m, H))


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh"])
def test_cells_derivatives(name: str) -> None:
    gates, operation = CELLS[name]
    w = make((gates * H, H), rank=1, frozen=False)
    inputs = normal(1, H), normal(1, H), normal(gates * H, H)
    check_derivatives(operation, w, *inputs)
    check_functorch(operation, w, *inputs)


def test_a_cell_saves_no_weight() -> None:
    w, v = make((48, 12)), torch.randn(48, 12, dtype=torch.float64)
    x = normal(2, 12)
    with counting_builds() as built:
        kept = saved_beyond(lambda w, x, v: torch.lstm_cell(x, (x, x), w, v)[0], w, x, v)
    assert kept == []
    assert not built


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_cell_has_the_bits_of_torchs_own(cell: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    adapted, plain = cell(5, 6, bias=bias), cell(5, 6, bias=bias)
    plain.load_state_dict(adapted.state_dict())
    lp.apply(adapted, ["weight_ih", "weight_hh"], rank=2)
    x = torch.randn(3, 5)
    h = torch.randn(3, 6)
    hx = (h, h * 2) if cell is nn.LSTMCell else h
    found, expected = adapted(x, hx), plain(x, hx)
    for a, b in zip(
        *((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_builds_each_weight_once(kind: type[nn.RNNBase], training: bool) -> None:
    torch.manual_seed(0)
    rnn = kind(5, 6, num_layers=2, bidirectional=True).train(training)
    lp.apply(rnn, ["re:weight.*"], rank=2)
    count = sum(name.endswith("lora_A") for name, _ in rnn.named_parameters())
    x = torch.randn(4, 3, 5)
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]])
    for data in (x, packed, x):
        with counting_builds() as built, torch.set_grad_enabled(training):
            rnn(data)
        assert len(built) == len({id(w) for w in built}) == count == 8


def test_a_layer_does_not_hold_on_to_what_was_built() -> None:
    rnn = lp.apply(nn.LSTM(5, 6), ["re:weight.*"], rank=2)
    rnn(torch.randn(4, 3, 5))
    for weight in rnn._flat_weights:
        assert not getattr(weight, "_built", None)


def test_the_cheaper_way_of_a_clone() -> None:
    w = make((12, H))
    with torch.no_grad():
        x = normal(2, H)
        found = torch.lstm_cell(x, (x, x), clone(w), clone(w))
        dense = merge(w.base, w.updates)
        torch.testing.assert_close(found, torch.lstm_cell(x, (x, x), dense, dense))
