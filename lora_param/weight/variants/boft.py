"""BOFT: rotations of the rows of W in stages, each over rows that lie further apart.

Liu et al. 2024, https://arxiv.org/abs/2311.06243, §4, as LyCORIS has it: in stage i a block takes
its rows at a distance of 2^i times half of its size, like the butterflies of a Fourier transform.
At another strength than 1, each stage's R lies between it and the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.weight.precision import exact
from lora_param.weight.variants.base import Tensors
from lora_param.weight.variants.oft import Rotation

__all__ = ["VARIANT"]


class _BOFT(Rotation):
    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        with exact(W):
            R = self.blocks(W, tensors, scale)  # (stages, k, b, b)
            one = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
            R = one + (R - one) * strength
            turned = W
            for stage in range(R.shape[0]):
                turned = _stage(R[stage], turned, 2**stage * (R.shape[-1] // 2))
            if "rescale" in tensors:
                turned = turned * tensors["rescale"].to(W.dtype).unsqueeze(-1)
            return turned - W


def _stage(R: Tensor, W: Tensor, distance: int) -> Tensor:
    """Each block's rotation of the rows that it takes. R (k, b, b), W (m, n) → (m, n)"""
    near = W.reshape(-1, 2, distance, W.shape[-1]).transpose(1, 2)  # (groups, distance, 2, n)
    blocks = near.reshape(*R.shape[:-1], -1)  # (k, b, n)
    back = (R @ blocks).reshape(near.shape).transpose(1, 2)  # (groups, 2, distance, n)
    return back.reshape(W.shape)


VARIANT = _BOFT()
