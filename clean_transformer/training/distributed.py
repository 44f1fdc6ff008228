"""Trains one model in several processes, with DistributedDataParallel or `fully_shard`."""

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
    """Join the process group if `torchrun` started this process; yield the device to use.

    On CUDA, each of several processes gets its own GPU.
    """
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
        traceback.clear_frames(error.__traceback__)  # the frames would keep the model alive
        raise
    finally:
        # DistributedDataParallel leaves a reference cycle, which has to be collected now. If Python
        # collected it after the process group is destroyed, the process could wait for the group's
        # threads for ever (PyTorch 2.13).
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def distribute(model: nn.Module, device: torch.device, *, sharded: bool) -> nn.Module:
    """Return the module to train. All processes start with the parameters of process 0.

    This also moves `model` to the device. By default, each process holds the whole model. With
    `sharded`, each process holds a part of every parameter and gathers the parameters of one block
    at a time. Sharding needs PyTorch 2.6.
    """
    if not dist.is_initialized():
        return model.to(device)
    if not sharded:
        # A swapped module may have unused parameters, which DistributedDataParallel has to find.
        # With this option, it also keeps its gradient buckets. Otherwise it changes them after the
        # first step, and a resumed run would sum the gradients in another order.
        return DistributedDataParallel(model.to(device), find_unused_parameters=True)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard requires it
    mesh = init_device_mesh(device.type, (n_processes(),))
    for part in (*model.blocks, model):  # fully_shard moves each part to the device
        fully_shard(part, mesh=mesh)
    return model


def accumulating(engine: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which gradients are accumulated but not yet reduced over processes.

    Use it for every micro-batch except the last. With `fully_shard`, gradients are reduced after
    every micro-batch, so that no process holds full gradients.
    """
    return engine.no_sync() if isinstance(engine, DistributedDataParallel) else nullcontext()


def mean_over_processes(x: Tensor) -> float:
    """Return the mean of the scalar `x` over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x.item() / n_processes()
