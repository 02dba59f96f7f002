"""Fingerprint of a base weight: the same for a tensor in memory and for its bytes in a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["BaseWeight", "hash_sample", "sample_positions", "tensor_base_weight"]

_SAMPLE = 1024

# Elements are sampled as integers of the same size: indexing is not implemented for every dtype.
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """Fingerprint of one base weight: shape, dtype and a hash over a sample of its elements.

    Files of other tools do not say what they were made on: then the dtype is "" and the hash None.
    """

    shape: tuple[int, ...]
    dtype: str = ""
    hash: str | None = None

    def differs(self, other: BaseWeight) -> str:
        """In what it differs from `other`: "dtype a, not b", "values", or ""."""
        if "" not in (self.dtype, other.dtype) and self.dtype != other.dtype:
            return f"dtype {other.dtype}, not {self.dtype}"
        return "values" if None not in (self.hash, other.hash) and self.hash != other.hash else ""


def sample_positions(numel: int) -> NDArray[np.int64]:
    """Positions, in the flattened weight, of the elements that a fingerprint is made of."""
    import numpy as np

    count = min(numel, _SAMPLE)
    return np.arange(count) * (numel - 1) // max(count - 1, 1)


def hash_sample(sample: bytes) -> str:
    """Hash of the sampled elements' bytes, little-endian, in order."""
    return hashlib.sha256(sample).hexdigest()[:16]


def tensor_base_weight(tensor: Tensor) -> BaseWeight:
    """Shape, dtype and a hash over sampled elements.

    The sample is taken element by element, whatever the strides are, so that nothing is copied but
    the sample. A tensor without plain data (meta, sparse, quantized) has no hash.

    >>> tensor_base_weight(torch.zeros(2, 2)).dtype
    'float32'
    """
    import numpy as np
    import torch

    tensor = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return BaseWeight(shape, dtype)
    if tensor.numel() == 0:
        return BaseWeight(shape, dtype, hash_sample(b""))
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())  # (*shape, 2)
    tensor = tensor.resolve_neg().view(getattr(torch, _BITS[tensor.element_size()]))
    positions = sample_positions(int(np.prod(shape)))
    where = np.unravel_index(positions, shape) if shape else (np.zeros(1, np.int64),)
    tensor = tensor if shape else tensor[None]
    index = tuple(torch.from_numpy(i).to(tensor.device) for i in where)
    return BaseWeight(shape, dtype, hash_sample(tensor[index].cpu().contiguous().numpy().tobytes()))
