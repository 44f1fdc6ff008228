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
    """Join the process group of `torchrun`, and leave it at the end of the `with` block.

    Yields the device that this process must use: the process's own GPU if `device` is a CUDA
    device, and `device` otherwise. If `torchrun` did not start this process, there is no process
    group to join, and `device` is yielded.
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
        # DistributedDataParallel is part of a reference cycle, so we run the garbage collector now.
        # If Python freed the cycle after the process group is destroyed, the process could wait
        # forever for the group's threads (PyTorch 2.13).
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, counted from 0. Without a process group, return 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    """Return the number of processes that train together. Without a process group, return 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def distribute(model: nn.Module, device: torch.device, *, sharded: bool) -> nn.Module:
    """Move `model` to `device`, and return the module to train: `model` or a wrapper around it.

    Without a process group, only the device changes. With a process group, all processes start with
    the parameters of process 0. By default, each process then holds the whole model. With
    `sharded`, each process holds a part of every parameter. Before a process runs a block, it gets
    the missing parts of this block's parameters from the other processes. Raises `ImportError` for
    `sharded` with a PyTorch before 2.6, which has no `fully_shard`.
    """
    if not dist.is_initialized():
        return model.to(device)
    if not sharded:
        # We set `find_unused_parameters` for two reasons. First, a swapped module may have
        # parameters that its `forward` does not use. Second, without this option,
        # DistributedDataParallel changes its gradient buckets after the first step of a process. A
        # resumed run would then sum some gradients in another order than an uninterrupted run.
        return DistributedDataParallel(model.to(device), find_unused_parameters=True)

    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if not hasattr(fsdp, "fully_shard"):
        raise ImportError(
            f"sharded training needs PyTorch 2.6 or later, and this is {torch.__version__}; "
            "update PyTorch, or leave out --sharded"
        )
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard requires it
    mesh = init_device_mesh(device.type, (n_processes(),))
    for part in (*model.blocks, model):  # fully_shard moves each part to the device
        fsdp.fully_shard(part, mesh=mesh)
    return model


def accumulating(engine: nn.Module) -> AbstractContextManager[None]:
    """Return a context manager that delays the gradient reduction of DistributedDataParallel.

    In the `with` block, a backward pass adds to the gradients of its own process, and does not
    average the gradients over the processes. Use the context manager for every micro-batch except
    the last. With `fully_shard`, it does nothing: the gradients are reduced after every
    micro-batch, so that no process holds full gradients.
    """
    return engine.no_sync() if isinstance(engine, DistributedDataParallel) else nullcontext()


def mean_over_processes(x: Tensor) -> float:
    """Return the mean of the scalar `x` over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x.item() / n_processes()
