"""LoHa, LoKr, Tucker's form, whole differences and rotations, beside their formulas."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_param as lp
from lora_param.errors import MismatchError, OptionError
from lora_param.targets.settings import Settings
from lora_param.weight.update import Deferred, make_update, merge
from lora_param.weight.variants import variant_of

KERNEL = (3, 2)


def drawn(settings: Settings, matrix: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = settings.shapes(matrix)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def tucker(core: Tensor, out: Tensor, inner: Tensor) -> Tensor:
    """Σ core[p, q, k] out[p, o] inner[q, i]: (o, i, k)."""
    return torch.einsum("pqk,po,qi->oik", core, out, inner)


def of_formula(t: dict[str, Tensor], matrix: tuple[int, int]) -> Tensor:
    """ΔW at scale 1, by LyCORIS' formulas."""
    if "hada_t1" in t:
        first, second = (
            tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in "12"
        )
        return (first * second).reshape(matrix)
    if "hada_w1_a" in t:
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    if "lora_mid" in t:
        return tucker(t["lora_mid"], t["lora_up"].T, t["lora_down"]).reshape(matrix)
    if "diff" in t:
        return t["diff"]
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"]).flatten(1)
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(w1, w2.contiguous())


LENGTHS = ("", "rows", "columns")
FORMS = [
    *itertools.product(["loha"], ["", "tucker"], LENGTHS),
    *itertools.product(["tucker"], [""], LENGTHS),
    *itertools.product(
        ["lokr"], ["", "both", "full", "tucker", "both+full", "both+tucker", "left3x4"], LENGTHS
    ),
    ("diff", "", ""),
]


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(("variant", "form", "lengths"), FORMS)
def test_the_update_is_the_formula_and_its_normal_form_is_the_same(
    variant: str, form: str, lengths: str, strength: float
) -> None:
    kernel = "kernel6" if variant == "tucker" or form or lengths == "columns" else ""
    kernel = "" if variant == "diff" else kernel
    settings = Settings(
        rank=2, alpha=3.0, variant=variant, form="+".join(filter(None, [form, lengths, kernel]))
    )
    matrix = (12, 48)
    tensors, W = drawn(settings, matrix), torch.randn(matrix, dtype=torch.float64)
    made = variant_of(settings)
    update = settings.scale * of_formula(tensors, matrix)
    wanted = update * strength
    if lengths:
        V = (W + update).reshape(12, 8 if kernel else 48, -1)
        over = (1, 2) if lengths == "rows" else (0, 2)
        m = tensors["magnitude"]
        m = m[:, None, None] if lengths == "rows" else m[None, :, None]
        wanted = ((m * V / V.norm(dim=over, keepdim=True)).reshape(matrix) - W) * strength
    found = made.delta(W, tensors, settings.scale, strength)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    u = Deferred(made, tensors, settings.scale, strength)
    lowered = u.lower(W)
    if lowered is not None:
        alpha, plain = lowered
        again = merge(W, [plain], alpha) - W
        torch.testing.assert_close(again, wanted, rtol=1e-9, atol=1e-9)
    assert lowered is not None or variant == "diff" or lengths == "columns" or "full" in form


@pytest.mark.parametrize("form", ["", "rows", "both", "both+full"])
@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_a_stack_is_one_matrix_after_the_other(variant: str, form: str) -> None:
    if variant == "loha" and "both" in form:
        form = ""
    settings = Settings(rank=2, variant=variant, form=form)
    tensors, W = drawn(settings, (3, 6, 8)), torch.randn(3, 6, 8, dtype=torch.float64)
    made = variant_of(settings)
    whole = made.delta(W, tensors, settings.scale, 1.0)
    for e in range(3):
        own = {n: t[e] for n, t in tensors.items()}
        torch.testing.assert_close(whole[e], made.delta(W[e], own, settings.scale, 1.0))


def cayley(Q: Tensor) -> Tensor:
    one = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (one + Q) @ torch.linalg.inv(one - Q)


@pytest.mark.parametrize("form", ["", "rescale", "constrained", "constrained+rescale"])
def test_rotations_of_rows(form: str) -> None:
    settings = Settings(rank=3, alpha=0.01, scaling="constant", variant="oft", form=form)
    W = torch.randn(12, 5, dtype=torch.float64)
    tensors = drawn(settings, (12, 5))
    Q = tensors["oft_blocks"] - tensors["oft_blocks"].mT
    if "constrained" in form:
        Q = Q * (0.01 * 12 / Q.norm())
    wanted = torch.block_diag(*cayley(Q)).T @ W
    if "rescale" in form:
        wanted = wanted * tensors["rescale"][:, None]
    found = merge(W, [make_update(variant_of(settings), tensors, settings.scale, 1.0)])
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
    half = merge(W, [make_update(variant_of(settings), tensors, settings.scale, 0.5)])
    torch.testing.assert_close(half, (W + wanted) / 2, rtol=1e-7, atol=1e-7)


def test_rotations_in_stages_mix_rows_at_doubling_distances() -> None:
    settings = Settings(rank=2, variant="boft", form="stages3")
    tensors = drawn(settings, (8, 5))
    W = torch.randn(8, 5, dtype=torch.float64)
    R = cayley(tensors["oft_blocks"] - tensors["oft_blocks"].mT)  # (3, 4, 2, 2)
    wanted = W
    for stage in range(3):
        distance, turned = 2**stage, wanted.clone()
        pairs = [i for i in range(8) if not i & distance]
        for block, i in zip(R[stage], pairs, strict=True):
            turned[[i, i + distance]] = block @ wanted[[i, i + distance]]
        wanted = turned
    found = merge(W, [make_update(variant_of(settings), tensors, 1.0, 1.0)])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("form", ["", "shared", "terms5", "shared+terms2"])
def test_rotations_of_columns(form: str) -> None:
    settings = Settings(rank=4, variant="oft_columns", form=form)
    W = torch.randn(5, 12, dtype=torch.float64)
    tensors = {n: t * 0.1 for n, t in drawn(settings, (5, 12)).items()}
    blocks = []
    for above in tensors["oft_R"].expand(3, 6):
        Q = torch.zeros(4, 4, dtype=torch.float64)
        Q[tuple(torch.triu_indices(4, 4, 1))] = above
        Q = Q - Q.T
        series = {
            "": lambda Q=Q: cayley(-Q),
            "terms5": lambda Q=Q: torch.eye(4) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q,
            "terms2": lambda Q=Q: torch.eye(4) + 2 * Q,
        }
        blocks.append(series[form.removeprefix("shared").removeprefix("+")]())
    wanted = W @ torch.block_diag(*blocks).T
    found = merge(W, [make_update(variant_of(settings), tensors, 1.0, 1.0)])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("lora", "tucker"),
        ("loha", "rows+columns"),
        ("lokr", "full+tucker"),
        ("lokr", "left3"),
        ("lokr", "left0x2"),
        ("loha", "kernel"),
        ("loha", "deep"),
        ("lokr", "full3"),
        ("lokr", "left2x2+left2x2"),
    ],
)
def test_a_form_that_there_is_not_is_refused(variant: str, form: str) -> None:
    with pytest.raises(OptionError, match="form"):
        Settings(variant=variant, form=form)


def test_a_file_of_another_form_is_not_loaded_over_it(tmp_path: Path) -> None:
    layer = torch.nn.Linear(6, 4)
    lp.save(
        lp.apply(layer, "weight", rank=2, variant="lokr", form="full"), tmp_path / "a.safetensors"
    )
    lp.remove(layer)
    lp.apply(layer, "weight", rank=2, variant="lokr")
    with pytest.raises(MismatchError, match="lokr of form 'full' in the file, '' here"):
        lp.load(layer, tmp_path / "a.safetensors")


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(OptionError, match=r"12 × 10"):
        Settings(variant="lokr", form="left5x2").shapes((12, 10))
