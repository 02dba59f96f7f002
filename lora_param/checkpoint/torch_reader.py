"""torch.distributed.checkpoint's own reader, given an index that was read without running it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lora_param.checkpoint.unpickling import check_archive
from lora_param.errors import BrokenFileError
from lora_param.files.distributed import StoredTensor
from lora_param.files.header import TORCH_SAVE
from lora_param.files.places import place

__all__ = ["load_tensor"]


class _Reader(FileSystemReader):
    """Looks at each archive before torch reads it."""

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        data = io.BytesIO(file.read(sinfo.length))
        path = place(self.path) / sinfo.relative_path
        if data.read(4) != TORCH_SAVE[0]:
            raise BrokenFileError(path, "a tensor in it is no archive of torch.save")
        check_archive(data, path)
        data.seek(0)
        return data


def load_tensor(directory: Path, name: str, entry: StoredTensor, W: torch.Tensor) -> None:
    """Read a tensor into one of its shape and dtype, chunk by chunk."""
    chunks = [
        ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks
    ]
    properties = TensorProperties(dtype=W.dtype)
    metadata = Metadata(
        {name: TensorStorageMetadata(properties, W.shape, chunks)},
        storage_data={
            MetadataIndex(name, c.offsets): _StorageInfo(c.file, c.start, c.stop - c.start)
            for c in entry.chunks
        },
    )
    reader, planner = _Reader(directory), DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner({name: W}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()
