"""Writes `lycoris-4.1.3.safetensors`: what LyCORIS saves of each of its methods, and its weights.

Run it where that version is installed without its requirements:

    pip install --no-deps --target other lycoris-lora==4.1.3 einops
    PYTHONPATH=other python tests/formats/write_lycoris_fixtures.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris_cases import CASES, layer_of
from safetensors.torch import save_file
from torch import Tensor

MODULES = {
    "locon": LoConModule,
    "loha": LohaModule,
    "lokr": LokrModule,
    "full": FullModule,
    "norm": NormModule,
    "oft": DiagOFTModule,
    "boft": ButterflyOFTModule,
}


def effective(module: torch.nn.Module, layer: torch.nn.Module) -> Tensor:
    """The weight that the module's own forward computes with: what it makes of unit inputs."""
    if isinstance(module, NormModule | FullModule):
        return module.get_merged_weight()[0]
    kinds = (DiagOFTModule, ButterflyOFTModule)
    W = layer.weight
    if isinstance(module, kinds):
        return module.make_weight()
    if isinstance(module, LoConModule):
        update = module.make_weight() * module.scale
    else:
        update = module.get_weight(module.shape)
    update = (update * module.scalar).reshape(W.shape)
    return module.apply_weight_decompose(W + update) if module.wd else W + update


def main() -> None:
    assert __import__("importlib.metadata").metadata.version("lycoris-lora") == "4.1.3"
    tensors: dict[str, Tensor] = {}
    for name, (method, kind, options) in CASES.items():
        layer = layer_of(name)
        torch.manual_seed(len(name))
        module = MODULES[method](name, layer, **options)
        if method == "full":
            module.apply_to()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape) * 0.3)
            state = module.custom_state_dict() or module.state_dict()
            weight = effective(module, layer)
            if method in ("full", "norm"):
                tensors[f"bias.{name}"] = module.get_merged_weight()[1]
            elif kind == "linear":  # its own forward agrees with that weight
                x = torch.randn(3, layer.weight.shape[1])
                wanted = torch.nn.functional.linear(x, weight, layer.bias)
                torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)
        tensors |= {f"state.lycoris_{name}.{k}": v for k, v in state.items()}
        tensors[f"weight.{name}"] = weight
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    save_file(tensors, Path(__file__).parent / "lycoris-4.1.3.safetensors")


if __name__ == "__main__":
    main()
