"""An adapter on a base of other names: ΔW is the same, element for element.

What transformers does between memory and disk is asked of transformers itself: a model whose
weights are ΔW is saved, and what its file holds is what the adapter must add there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import mixtral, qwen3_moe
from torch import Tensor

from lora_param.adapter import Adapter, AdapterTarget, Host
from lora_param.errors import LayoutError, MismatchError
from lora_param.fingerprint import BaseWeight
from lora_param.names.fit import fitted as fit_to
from lora_param.names.resolve import Here, PartOf, WholeOf, resolve
from lora_param.names.table import Names, parse_names
from lora_param.targets.regions import Region, Target
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight

STACK = Region(stacked=True)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Weight]:
    return {n: Weight(n, tuple(s)) for n, s in shapes.items()}


def fitted(
    adapter: Adapter,
    base: dict[str, Weight],
    name: str,
    names: Names | None = None,
    model_type: str | None = None,
) -> tuple[Adapter, list[str]]:
    new = fit_to(adapter, Host(name, base, lambda n: torch.zeros(base[n].shape), model_type, names))
    return new, list(new.notes)


def adapter_on(
    shapes: dict[str, tuple[int, ...]], rank: int = 2, variant: str = "lora", **settings: object
) -> Adapter:
    """An adapter with random factors over these weights, stacks of experts by matrix."""
    made = Settings(rank=rank, alpha=3.0, variant=variant, **settings)  # type: ignore[arg-type]
    targets, tensors, base = {}, {}, {}
    torch.manual_seed(len(shapes))
    for name, shape in shapes.items():
        target = Target(name, STACK if len(shape) == 3 else Region())
        targets[str(target)] = AdapterTarget(target, made)
        for short, size in made.shapes(target.region.matrix(shape)).items():
            tensors[f"{target}.{short}"] = torch.randn(size)
        base[name] = BaseWeight(tuple(shape), "float32", "0" * 16)
    return Adapter(targets, tensors, base)


def deltas(adapter: Adapter, base: dict[str, Weight]) -> dict[str, Tensor]:
    """ΔW of each weight in fp32, zero where it is not adapted."""
    found = {n: torch.zeros(w.shape) for n, w in base.items()}
    for key, t in adapter.targets.items():
        f = adapter.factors(key)
        delta = t.scale * t.strength * (f["lora_B"] @ f["lora_A"])
        part = found[t.target.name][t.target.region.index]
        part += delta.reshape(part.shape)
    return found


def rows_of(parts: dict[str, Tensor], *names: str) -> Tensor:
    return torch.cat([parts[n] for n in names])


QKV = {"l.q_proj.weight": (8, 6), "l.k_proj.weight": (4, 6), "l.v_proj.weight": (4, 6)}


def test_split_projections_become_slices_of_a_fused_one():
    adapter, base = adapter_on(QKV), weights({"model.l.qkv_proj.weight": (16, 6)})
    new, told = fitted(adapter, base, "the base")
    assert list(new.targets) == [f"model.l.qkv_proj.weight[{s}]" for s in ("0:8", "8:12", "12:16")]
    expected = rows_of(deltas(adapter, weights(QKV)), *QKV)
    assert torch.equal(deltas(new, base)["model.l.qkv_proj.weight"], expected)
    assert told == [
        "3 of 3 targets put together by "
        "'*.qkv_proj.weight = *.q_proj.weight | *.k_proj.weight ~ *.v_proj.weight'."
    ]


@pytest.mark.parametrize(
    ("adapted", "rows"),
    [
        (["q"], ["0:8"]),
        (["k"], ["8:12"]),  # k and v are of one size, so q is what is left
        (["v"], ["12:16"]),
        (["q", "v"], ["0:8", "12:16"]),
    ],
)
def test_the_rows_of_a_few_parts_are_told_by_their_sizes(adapted, rows):
    chosen = {n: s for n, s in QKV.items() if n.split("_")[0][-1] in adapted}
    new, _ = fitted(adapter_on(chosen), weights({"l.qkv_proj.weight": (16, 6)}), "the base")
    assert list(new.targets) == [f"l.qkv_proj.weight[{r}]" for r in rows]


def test_rows_that_cannot_be_told_are_refused():
    shapes = {"a.q_a_proj.weight": (8, 6)}
    names = parse_names("*.abc.weight = *.x.weight | *.q_a_proj.weight | *.y.weight", "an example")
    with pytest.raises(LayoutError, match=r"which rows of a\.abc\.weight it is"):
        fitted(adapter_on(shapes), weights({"a.abc.weight": (30, 6)}), "the base", names=names)


def test_splitting_and_fusing_again_gives_the_same_bits():
    adapter = adapter_on({"l.qkv_proj.weight": (16, 6)})
    split, _ = fitted(adapter, weights(QKV), "the base")
    assert list(split.targets) == list(QKV)
    again, _ = fitted(split, weights({"l.qkv_proj.weight": (16, 6)}), "the base")
    assert list(again.targets) == ["l.qkv_proj.weight"]
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    assert (
        again.targets["l.qkv_proj.weight"].settings == adapter.targets["l.qkv_proj.weight"].settings
    )


def test_a_variant_of_rows_is_split_and_sliced_too():
    adapter = adapter_on({"l.qkv_proj.weight": (16, 6)}, variant="dora")
    split, _ = fitted(adapter, weights(QKV), "the base")
    magnitude = [split.tensors[f"{n}.magnitude"] for n in QKV]
    assert torch.equal(torch.cat(magnitude), adapter.tensors["l.qkv_proj.weight.magnitude"])
    again, _ = fitted(split, weights({"l.qkv_proj.weight": (16, 6)}), "the base")
    assert len(again.targets) == 3


MIXTRAL = {"x.mlp.experts.gate_up_proj": (4, 10, 6), "x.mlp.experts.down_proj": (4, 6, 5)}


def per_expert(turned: bool = False) -> dict[str, tuple[int, ...]]:
    head = "x.feed_forward.experts" if turned else "x.block_sparse_moe.experts"
    gate, down, up = ("gate_proj", "down_proj", "up_proj") if turned else ("w1", "w2", "w3")
    found = {}
    for e in range(4):
        found |= {f"{head}.{e}.{gate}.weight": (5, 6), f"{head}.{e}.{down}.weight": (6, 5)}
        found[f"{head}.{e}.{up}.weight"] = (5, 6)
    return found


def test_a_stack_is_taken_apart_and_put_together():
    adapter, disk = adapter_on(MIXTRAL), per_expert()
    split, _ = fitted(adapter, weights(disk), "the base")
    assert set(split.targets) == set(disk)
    mine, theirs = deltas(adapter, weights(MIXTRAL)), deltas(split, weights(disk))
    for e in range(4):
        head = f"x.block_sparse_moe.experts.{e}"
        both = rows_of(theirs, f"{head}.w1.weight", f"{head}.w3.weight")
        assert torch.allclose(both, mine["x.mlp.experts.gate_up_proj"][e], atol=1e-6)
    again, _ = fitted(split, weights(MIXTRAL), "the base")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


def test_experts_with_factors_of_their_own_become_one_stack():
    disk = {n: s for n, s in per_expert().items() if ".2." not in n}
    adapter = adapter_on(disk)
    new, _ = fitted(adapter, weights(MIXTRAL), "the base")
    t = new.targets["x.mlp.experts.gate_up_proj[*]"]
    assert (t.settings.rank, t.settings.alpha, t.scale) == (4, 6.0, 1.5)
    mine, theirs = deltas(adapter, weights(per_expert())), deltas(new, weights(MIXTRAL))
    for e in range(4):
        head = f"x.block_sparse_moe.experts.{e}"
        both = rows_of(mine, f"{head}.w1.weight", f"{head}.w3.weight")
        assert torch.allclose(theirs["x.mlp.experts.gate_up_proj"][e], both, atol=1e-6)
        assert torch.equal(theirs["x.mlp.experts.down_proj"][e], mine[f"{head}.w2.weight"])
    assert not theirs["x.mlp.experts.down_proj"][2].any()


def test_scales_and_ranks_that_differ_among_experts():
    disk = per_expert()
    adapter = adapter_on(disk)
    for e, (rank, alpha) in enumerate([(1, 2.0), (2, 2.0), (3, 1.0), (2, 5.0)]):
        for name in (n for n in disk if f".{e}." in n):
            t = adapter.targets[name]
            adapter.targets[name] = replace(t, settings=Settings(rank=rank, alpha=alpha))
            for short, size in adapter.targets[name].settings.shapes(disk[name]).items():
                adapter.tensors[f"{name}.{short}"] = torch.randn(size)  # type: ignore[index]
    new, _ = fitted(adapter, weights(MIXTRAL), "the base")
    mine, theirs = deltas(adapter, weights(disk)), deltas(new, weights(MIXTRAL))
    for e in range(4):
        w2 = mine[f"x.block_sparse_moe.experts.{e}.w2.weight"]
        assert torch.allclose(theirs["x.mlp.experts.down_proj"][e], w2, atol=1e-5)


def test_a_stack_that_holds_in_by_out():
    memory = {"x.feed_forward.experts.gate_up_proj": (4, 6, 10)}
    disk = {n: s for n, s in per_expert(turned=True).items() if "down" not in n}
    adapter = adapter_on(memory)
    split, _ = fitted(adapter, weights(disk), "the base")
    mine, theirs = deltas(adapter, weights(memory)), deltas(split, weights(disk))
    for e in range(4):
        head = f"x.feed_forward.experts.{e}"
        both = rows_of(theirs, f"{head}.gate_proj.weight", f"{head}.up_proj.weight")
        expected = mine["x.feed_forward.experts.gate_up_proj"][e].T
        assert torch.allclose(both, expected, atol=1e-6)
    again, _ = fitted(split, weights(memory), "the base")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


def test_rows_that_take_turns():
    memory = {"x.mlp.experts.gate_up_proj": (2, 6, 10)}
    disk = {f"x.mlp.experts.{e}.{p}_proj.weight": (5, 6) for e in (0, 1) for p in ("gate", "up")}
    adapter = adapter_on(memory)
    split, _ = fitted(adapter, weights(disk), "the base", model_type="gpt_oss")
    mine, theirs = deltas(adapter, weights(memory)), deltas(split, weights(disk))
    for e in (0, 1):
        stored = mine["x.mlp.experts.gate_up_proj"][e]
        for i, p in enumerate(("gate", "up")):
            found = theirs[f"x.mlp.experts.{e}.{p}_proj.weight"]
            assert torch.allclose(found, stored[:, i::2].T, atol=1e-6)
    again, _ = fitted(split, weights(memory), "the base", model_type="gpt_oss")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


def test_prefixes_come_and_go_and_the_fingerprint_stays():
    adapter = adapter_on({"base_model.model.model.layers.0.o_proj.weight": (4, 4)})
    new, told = fitted(adapter, weights({"language_model.layers.0.o_proj.weight": (4, 4)}), "b")
    assert new.base["language_model.layers.0.o_proj.weight"].hash == "0" * 16
    assert told == ["1 of 1 targets under another name."]


def test_names_that_are_the_bases_own_change_nothing():
    adapter = adapter_on(QKV)
    new, told = fitted(adapter, weights(QKV), "the base")
    assert new is adapter
    assert told == []


def test_a_partial_match_lists_both_sides_and_the_nearest_rule():
    base = {"l.q_proj.weight": (8, 6), "l.k_proj.weight": (4, 6)}  # no v
    adapter = adapter_on({"l.qkv_proj.weight": (16, 6), "l.q_proj.weight": (8, 6)})
    with pytest.raises(MismatchError) as caught:
        fitted(adapter, weights(base), "the base")
    text = str(caught.value)
    assert "1 of 2 targets fit" in text
    assert "In the adapter alone: l.qkv_proj.weight" in text
    assert "In the base alone: l.k_proj.weight" in text
    assert "for which l.v_proj.weight is missing" in text


def test_two_names_that_differ_in_their_prefix_alone_are_never_guessed():
    base = weights({"model.l.weight": (4, 4), "language_model.l.weight": (4, 4)})
    with pytest.raises(MismatchError, match=r"could be any of model\.l\.weight, lang"):
        fitted(adapter_on({"base_model.model.l.weight": (4, 4)}), base, "the base")


def test_kinds_of_places():
    found = resolve(
        ["a.weight", "module.a.weight", "l.q_proj.weight", "m.gate_up_proj.weight"],
        ["a.weight", "l.qkv_proj.weight", "m.gate_proj.weight", "m.up_proj.weight"],
    )
    kinds = [type(p) for p in found.places.values()]
    assert kinds == [Here, Here, PartOf, WholeOf]
    assert found.complete
    assert not found.is_identity


@pytest.mark.parametrize("what", ["mixtral", "qwen3_moe"])
def test_memory_and_disk_of_transformers(what, tmp_path):
    """Every adapted stack of a live model finds its place in the file that transformers writes."""
    model = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}[what]()
    live = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    adapter = adapter_on(live)
    mine = deltas(adapter, weights(live))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in mine:
                p.copy_(mine[name])
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    disk = weights({n: tuple(t.shape) for n, t in file.items()})
    new, told = fitted(adapter, disk, "the file", model_type=what)
    theirs = deltas(new, disk)
    adapted = {t.target.name for t in new.targets.values()}
    assert adapted == {n for n, w in disk.items() if len(w.shape) > 1}
    for name in adapted:
        assert torch.allclose(theirs[name], file[name], atol=1e-6), name
    assert sum(int(line.split()[0]) for line in told) == len(adapter.targets)
    back, _ = fitted(new, weights(live), "the model", model_type=what)
    assert set(back.targets) == set(adapter.targets)
    for name, tensor in adapter.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
