"""One model on many processes, through PyTorch's own engines."""

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes that `torchrun` started, if it did, each with a GPU of its own."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    try:
        yield device
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold what they worked with
        raise
    finally:
        # What DistributedDataParallel leaves is a cycle. Collected after the group, it would end
        # that, and wait for its threads with the lock that they may wait for (PyTorch 2.13).
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def spread(model: nn.Module, device: torch.device, *, sharded: bool) -> nn.Module:
    """The model as every process calls it, with the parameters of process 0.

    Each holds a copy, or where `sharded` a part of every parameter, and gathers those of one block
    when it comes to it. Needs PyTorch 2.6 for that. The model itself is moved.
    """
    if not dist.is_initialized():
        return model.to(device)
    if not sharded:
        # Looking for unused parameters lets a variant have some, and keeps the gradients where
        # they are in the buffers that are summed: moved after the first step, they would be summed
        # in another order before than after an interruption.
        return DistributedDataParallel(model.to(device), find_unused_parameters=True)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard asks for it
    mesh = init_device_mesh(device.type, (n_processes(),))
    for part in (*model.blocks, model):  # each moves to the device by itself, and leaves its share
        fully_shard(part, mesh=mesh)
    return model


def unsummed(engine: nn.Module) -> AbstractContextManager[None]:
    """A context in which the processes' gradients need not be summed yet: more are to come.

    Shards sum them each time: to hold whole gradients is what they are to avoid.
    """
    return engine.no_sync() if isinstance(engine, DistributedDataParallel) else nullcontext()


def mean(x: Tensor) -> float:
    """The mean of one number over the processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x.item() / n_processes()
