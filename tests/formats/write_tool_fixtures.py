"""Writes `tests/formats/tools/`: what other tools save, and the weights that they merge it into.

Run in an environment of its own, which has loralib 0.1.2, torchtune 0.6.1, diffusers 0.42.1 (with
peft 0.21.2), mlx 0.32.4 and mlx-lm 0.32.2 for Linux:

    python tests/formats/write_tool_fixtures.py

Beside each adapter lie `base.safetensors` and `merged.safetensors`: the weights before, and after
the tool's own code has merged the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TOOLS = Path(__file__).parent / "tools"


def saved(name: str, base: dict[str, Tensor], merged: dict[str, Tensor]) -> Path:
    folder = TOOLS / name
    folder.mkdir(parents=True, exist_ok=True)
    for which, tensors in {"base": base, "merged": merged}.items():
        contiguous = {n: t.detach().clone().contiguous() for n, t in tensors.items()}
        save_file(contiguous, folder / f"{which}.safetensors")
    return folder


def randomized(module: nn.Module, marks: tuple[str, ...]) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if any(mark in name for mark in marks):
                nn.init.normal_(p, std=0.3)


def write_loralib() -> None:
    import loralib

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = loralib.Linear(6, 10, r=2, lora_alpha=3)
            self.turned = loralib.Linear(6, 10, r=3, lora_alpha=3, fan_in_fan_out=True)
            self.emb = loralib.Embedding(12, 6, r=2, lora_alpha=3)
            self.qkv = loralib.MergedLinear(
                6, 18, r=2, lora_alpha=3, enable_lora=[True, False, True]
            )
            self.c_attn = loralib.MergedLinear(
                6, 18, r=2, lora_alpha=3, enable_lora=[True, False, True], fan_in_fan_out=True
            )

    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = loralib.Conv2d(4, 5, 3, r=2, lora_alpha=3)
            self.point = loralib.Conv2d(4, 5, 1, r=2, lora_alpha=3)

    for name, make in {"loralib": Net, "loralib-convs": Convs}.items():
        torch.manual_seed(0)
        net = make().train()
        randomized(net, ("lora_",))
        base = {n: t.clone() for n, t in net.state_dict().items() if "lora_" not in n}
        state = loralib.lora_state_dict(net, bias="lora_only")
        if name == "loralib":  # a trained bias, too
            state["fc.bias"] = state["fc.bias"] + 1
        adapter = {n: t.clone() for n, t in state.items()}
        net.eval()  # merges
        merged = {n: t for n, t in net.state_dict().items() if "lora_" not in n}
        if name == "loralib":
            merged["fc.bias"] = adapter["fc.bias"]
        folder = saved(name, base, merged)
        torch.save(adapter, folder / "lora.pt")


def write_torchtune() -> None:
    from torchtune.models.convert_weights import tune_to_hf
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

    sizes = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 16}
    for name, dora in {"torchtune": False, "torchtune-dora": True}.items():
        torch.manual_seed(0)
        net = lora_llama3(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            apply_lora_to_output=True,
            vocab_size=20,
            num_layers=2,
            max_seq_len=32,
            intermediate_dim=24,
            lora_rank=2,
            lora_alpha=5.0,
            use_dora=dora,
            **sizes,
        )
        randomized(net, ("lora_", "magnitude"))
        adapter = {n: p.detach().clone() for n, p in get_adapter_params(net).items()}
        state = {n: t.clone() for n, t in net.state_dict().items()}
        base = {n: t for n, t in state.items() if "lora_" not in n and "magnitude" not in n}
        merged = get_merged_lora_ckpt({n: t.clone() for n, t in state.items()}, 2, 5.0)
        told = {"num_heads": 4, "num_kv_heads": 2, "dim": 16}
        folder = saved(name, base, merged)
        torch.save(adapter, folder / "adapter_model.pt")
        hf = folder / "hf"
        hf.mkdir(exist_ok=True)
        save_file(
            {n: t.contiguous() for n, t in tune_to_hf(base, **told).items()},
            hf / "model.safetensors",
        )
        config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
        (hf / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
        save_file(
            {n: t.contiguous() for n, t in tune_to_hf(merged, **told).items()},
            folder / "merged_hf.safetensors",
        )


def write_mlx() -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama, qwen3_moe
    from mlx_lm.tuner.utils import linear_to_lora_layers

    common = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 20,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
    }
    experts = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    }
    llama_keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    cases = {
        "mlx": (llama, {}, [*llama_keys, "model.embed_tokens"], False),
        "mlx-dora": (llama, {}, llama_keys, True),
        "mlx-experts": (
            qwen3_moe,
            experts,
            ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj", "self_attn.k_proj"],
            False,
        ),
    }

    def plain(tree: object) -> dict[str, Tensor]:
        import numpy as np

        return {n: torch.from_numpy(np.array(a)) for n, a in tree_flatten(tree)}

    for name, (kind, more, keys, dora) in cases.items():
        mx.random.seed(0)
        model_type = kind.__name__.rpartition(".")[2]
        net = kind.Model(kind.ModelArgs(model_type=model_type, **common, **more))
        base = plain(net.parameters())
        parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": keys}
        net.freeze()
        linear_to_lora_layers(net, -1, parameters, use_dora=dora)
        trained = {
            n: mx.random.normal(a.shape) * 0.3 + (1.0 if n.endswith(".m") else 0.0)
            for n, a in tree_flatten(net.trainable_parameters())
        }
        net.load_weights(list(trained.items()), strict=False)
        merged = dict(base)
        for module_name, module in net.named_modules():
            if hasattr(module, "fuse"):
                merged[f"{module_name}.weight"] = plain(module.fuse().parameters())["weight"]
        folder = saved(name, base, merged)
        mx.save_safetensors(str(folder / "adapters.safetensors"), trained, {"format": "mlx"})
        config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": -1}
        config["lora_parameters"] = parameters
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))


def write_diffusers() -> None:
    import peft
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    def unet() -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=2,
        )

    leaves = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
    for name, dora, rslora in [
        ("diffusers", False, False),
        ("diffusers-dora", True, False),
        ("diffusers-rslora", False, True),
        ("diffusers-first", False, False),
    ]:
        net = unet()
        base = {n: t.clone() for n, t in net.state_dict().items()}
        first = name == "diffusers-first"
        config = peft.LoraConfig(
            r=2,
            lora_alpha=2 if first else 5,
            target_modules=leaves[:4] if first else leaves,
            rank_pattern={} if first else {"to_k": 3},
            alpha_pattern={} if first else {"to_v": 7},
            use_dora=dora,
            use_rslora=rslora,
            init_lora_weights=False,
        )
        net.add_adapter(config)
        randomized(net, ("lora_B",))
        layers = get_peft_model_state_dict(net)
        folder = TOOLS / name
        if first:  # as it was saved before PEFT was there, alpha being the rank
            layers = convert_state_dict_to_diffusers(layers)
        StableDiffusionPipeline.save_lora_weights(
            str(folder),
            unet_lora_layers=layers,
            unet_lora_adapter_metadata=None if first else net.peft_config["default"].to_dict(),
        )
        net.fuse_lora() if hasattr(net, "fuse_lora") else None
        net.unload_lora() if hasattr(net, "unload_lora") else None
        merged = {
            n.replace(".base_layer", ""): t for n, t in net.state_dict().items() if "lora_" not in n
        }
        changed = {n for n in base if not torch.equal(base[n], merged[n])}
        assert changed, name
        saved(name, {n: base[n] for n in changed}, {n: merged[n] for n in changed})


def write_names() -> None:
    """Names of the first Stable Diffusion checkpoints, and what diffusers makes of them."""
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_open_clip_checkpoint,
    )

    resnet = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    resnet.append("skip_connection")
    block = "transformer_blocks.0"
    attention = ["norm", "proj_in", "proj_out", f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    attention += [
        f"{block}.attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    more = ["time_embed.0", "time_embed.2", "out.0", "out.2", "input_blocks.0.0"]

    def modules(blocks: int, with_attention: set[int]) -> list[str]:
        found = list(more)
        for b in range(blocks):
            for i in (1 + 3 * b, 2 + 3 * b):
                found += [f"input_blocks.{i}.0.{leaf}" for leaf in resnet]
                if b in with_attention:
                    found += [f"input_blocks.{i}.1.{leaf}" for leaf in attention]
            if b < blocks - 1:
                found.append(f"input_blocks.{3 + 3 * b}.0.op")
        found += [f"middle_block.{i}.{leaf}" for i in (0, 2) for leaf in resnet]
        found += [f"middle_block.1.{leaf}" for leaf in attention]
        for b in range(blocks):
            for i in range(3 * b, 3 * b + 3):
                found += [f"output_blocks.{i}.0.{leaf}" for leaf in resnet]
                if blocks - 1 - b in with_attention:
                    found += [f"output_blocks.{i}.1.{leaf}" for leaf in attention]
            if b < blocks - 1:
                place = 2 if blocks - 1 - b in with_attention else 1
                found.append(f"output_blocks.{3 * b + 2}.{place}.conv")
        return found

    def paired(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, str]:
        of_value = {float(t.flatten()[0]): n for n, t in after.items()}
        return {
            n.removesuffix(".weight"): of_value[float(t.flatten()[0])].removesuffix(".weight")
            for n, t in before.items()
        }

    found = {}
    start = "model.diffusion_model."
    for name, blocks, where, config in [
        ("sdxl", 3, {1, 2}, {"addition_embed_type": "text_time"}),
        ("sd15", 4, {0, 1, 2}, {}),
    ]:
        names = modules(blocks, where)
        names += ["label_emb.0.0", "label_emb.0.2"] if name == "sdxl" else []
        kinds = [f"{start}{n}.weight" for n in names]
        ldm = {n: torch.tensor([float(i)]) for i, n in enumerate(kinds)}
        filled = ldm | {n.replace(".weight", ".bias"): -1 - t for n, t in ldm.items()}
        diffusers = convert_ldm_unet_checkpoint(filled, {"layers_per_block": 2, **config})
        weights = {n: t for n, t in diffusers.items() if n.endswith(".weight")}
        pairs = paired(ldm, weights)
        found[name] = {n.removeprefix(start): f"unet.{own}" for n, own in pairs.items()}
    prefix = "conditioner.embedders.1.model."
    leaves = ["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
    names = [f"transformer.resblocks.{i}.{leaf}" for i in range(12) for leaf in leaves]
    clip = {f"{prefix}{n}.weight": torch.tensor([float(i)]) for i, n in enumerate(names)}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=4), load_state_dict=None)
    kept: dict[str, Tensor] = {}
    model.load_state_dict = lambda state, **_: kept.update(state)
    made = convert_open_clip_checkpoint(model, dict(clip), prefix) or kept
    pairs = paired(clip, made)
    found["open_clip"] = {n.removeprefix(prefix): f"text_encoder_2.{p}" for n, p in pairs.items()}
    path = TOOLS / "sd-names.json"
    path.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["loralib", "torchtune", "mlx", "diffusers", "names"]
    for tool in wanted:
        globals()[f"write_{tool}"]()
