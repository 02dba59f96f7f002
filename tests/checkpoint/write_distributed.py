"""Distributed checkpoints, each written by as many processes as its directory is called.

Of `weights`, some are sharded by rows, some by columns, some are whole on every rank; the rest is
what a training keeps beside them.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_samples import weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

PLACED = {"a.q.weight": Shard(0), "b.q.weight": Shard(1), "b.v.weight": Shard(0)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 10), nn.ReLU(), nn.Linear(10, 3))


def rank_of(folder: Path, rank: int, size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    mesh = init_device_mesh("cpu", (size,))
    state = {
        name: distribute_tensor(W, mesh, [PLACED.get(name, Replicate())])
        for name, W in weights().items()
    }
    dcp.save(state, checkpoint_id=folder / "flat")
    model = fully_shard(net(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 7)).sum().backward()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 5}
    dcp.save(saved, checkpoint_id=folder / "fsdp")
    dist.barrier()
    dist.destroy_process_group()


def main(root: Path, sizes: list[str]) -> None:
    for size in sizes:
        folder = root / size
        folder.mkdir()
        context = multiprocessing.get_context("fork")  # torch is imported once
        ranks = [
            context.Process(target=rank_of, args=(folder, rank, int(size)))
            for rank in range(int(size))
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
