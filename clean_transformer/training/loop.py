"""Training: next-token prediction, on one device or many, which goes on to the bit after a kill."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint as checkpoint_activations

from clean_transformer.hooks import HookPoint
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.unembed import TiedUnembed
from clean_transformer.support.devices import resolve_device
from clean_transformer.support.stand_in import Method, StandIn
from clean_transformer.training import checkpoint
from clean_transformer.training.checkpoint import Measured, Metrics
from clean_transformer.training.distributed import mean, n_processes, rank, spread, unsummed
from clean_transformer.training.loss import cross_entropy
from clean_transformer.training.settings import Training
from clean_transformer.training.windows import Tokens, refuse_tokens, window


def train(
    model: DemoTransformer,
    tokens: Tokens,
    folder: str | Path,
    training: Training,
    *,
    held_out: Tokens | None = None,
    device: str | torch.device = "auto",
    on_step: Callable[[Measured], object] = lambda measured: None,
) -> None:
    """Train the model in place, swapped modules and all; go on if `folder` has a run already.

    `tokens` [pos] are integers, such as a memory-mapped uint16 array. `folder` gets checkpoint.pt
    and metrics.jsonl, a JSON object for every step; process 0 also calls `on_step` with that. After
    a kill at any moment, the same call goes on from the last checkpoint, to the same bits in the
    end: everything else a step depends on, its windows and its random numbers, follows from
    `training.seed` and its number.

    With `torch.distributed` initialized (see `distributed.joined`), all processes train together;
    a sharded model is left in shards, and whole in the checkpoint. b_U is left as it is: GPT-2 has
    none, and Hugging Face's format no place for it.

    Raises `ValueError` before any work for tokens that the model cannot read, too few of them, a
    batch that the processes cannot share, and a folder with another run, naming what differs;
    `RuntimeError` once a gradient is not finite, with the last checkpoint kept.
    """
    folder, device = Path(folder), resolve_device(device)
    share = _share(training)
    _refuse_untrained_embedding(model)
    refuse_tokens("the tokens", tokens, model.cfg)
    if held_out is not None:
        refuse_tokens("the held-out tokens", held_out, model.cfg)
    modules = {
        path: type(module).__name__
        for path, module in model.named_modules()
        if not isinstance(module, HookPoint)
    }
    about = model.cfg.to_dict() | asdict(training) | {"n_tokens": len(tokens)} | modules
    saved = checkpoint.read(folder, about)

    def windows(of: Tokens, batch: int) -> Int[Tensor, "window pos"]:
        """This process's share of a batch, from 0."""
        first = batch * training.batch + rank() * share
        numbers = range(first, first + share)
        drawn = [window(of, number, model.cfg.n_ctx, training.seed) for number in numbers]
        return torch.stack(drawn).to(device)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name != "unembed.b_U")
    recomputing = recomputing_blocks(model) if training.recompute else nullcontext()
    with deterministic(), recomputing:
        engine = spread(model, device, sharded=training.sharded)
        optimizer = adamw(model, training)
        done = 0
        if saved is not None:
            checkpoint.restore(saved, engine, optimizer)
            done = saved["step"]
        if rank() == 0:
            metrics = Metrics(folder, done)
        for step in range(done, training.steps):
            began = perf_counter()
            torch.manual_seed(_seed(training.seed, step, rank()))
            loss, norm = update(engine, optimizer, windows(tokens, step), training, step)
            if not math.isfinite(norm):
                raise RuntimeError(
                    f"the norm of the gradients is {norm} in step {step + 1}; {folder} keeps what "
                    "was before: train in another folder with a lower learning rate, or from there"
                )
            seconds = perf_counter() - began
            last = step + 1 == training.steps
            held_out_loss = None
            if held_out is not None and (last or (step + 1) % training.held_out_every == 0):
                batches = (windows(held_out, n) for n in range(training.held_out_batches))
                held_out_loss = evaluate(engine, batches, training)
            if rank() == 0:
                speed = training.batch * model.cfg.n_ctx / seconds
                measured = Measured(step + 1, loss, norm, training.rate(step), speed, held_out_loss)
                metrics.add(measured)
                on_step(measured)
            if last or (step + 1) % training.save_every == 0:
                checkpoint.save(folder, engine, optimizer, step + 1, about)


def adamw(model: nn.Module, training: Training) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) on what is to be trained; only matrices decay.

    Gains and biases do not, whose last names begin with b (b_Q has two axes, but is one).
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.rpartition(".")[2].startswith("b")
        if parameter.requires_grad:
            (decaying if is_matrix else others).append(parameter)
    return AdamW(
        [
            {"params": decaying, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=all(parameter.is_cuda for parameter in decaying),
    )


def update(
    engine: nn.Module,
    optimizer: AdamW,
    windows: Int[Tensor, "window pos"],
    training: Training,
    step: int,
) -> tuple[float, float]:
    """One step on this process's windows: the loss and the gradient's norm, both over all."""
    engine.train()
    parts = windows.chunk(training.accumulation)
    total = torch.zeros((), device=windows.device, dtype=torch.float64)
    for number, part in enumerate(parts):
        with nullcontext() if number + 1 == len(parts) else unsummed(engine):
            loss = next_token_loss(engine, part, training) / len(parts)
            torch.autograd.backward(loss)
        total += loss.detach()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # a variant may leave one unused
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.clip_grad_norm_(parameters, training.clip)
    for group in optimizer.param_groups:
        group["lr"] = training.rate(step)
    optimizer.step()
    optimizer.zero_grad()
    norm = norm.full_tensor() if training.sharded else norm  # type: ignore[attr-defined]
    return mean(total), norm.item()


def next_token_loss(
    engine: nn.Module, windows: Int[Tensor, "window pos"], training: Training
) -> Float[Tensor, ""]:
    """The mean cross-entropy, in nats, of every token of the windows but the first."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=training.autocast):
        logits = engine(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(
    engine: nn.Module, batches: Iterator[Int[Tensor, "window pos"]], training: Training
) -> float:
    """The mean loss over the batches and all processes."""
    engine.eval()
    losses = [
        next_token_loss(engine, part, training).double()
        for windows in batches
        for part in windows.chunk(training.accumulation)
    ]
    return mean(torch.stack(losses).mean())


@contextmanager
def recomputing_blocks(model: DemoTransformer) -> Iterator[None]:
    """Keep nothing of a block but its input, and compute it again in the backward pass.

    Chen et al. 2016: memory for one block's activations in the place of all, for a third more time.
    """
    with ExitStack() as put:
        for block in model.blocks:
            put.enter_context(StandIn(block, "forward", recomputed))
        yield


def recomputed(below: Method) -> Method:
    """Under gradients, keep only the inputs of this method, and call it again going backward."""
    return partial(checkpoint_activations, below, use_reentrant=False)


@contextmanager
def deterministic() -> Iterator[None]:
    """Only kernels that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _share(training: Training) -> int:
    """How many windows of a batch each process reads."""
    parts = n_processes() * training.accumulation
    if training.batch % parts:
        raise ValueError(
            f"a batch of {training.batch} windows is not divisible by {n_processes()} processes × "
            f"{training.accumulation} parts each; take a multiple of {parts}"
        )
    if training.sharded and n_processes() == 1:
        raise ValueError("sharded needs several processes, as torchrun starts them; this is one")
    return training.batch // n_processes()


def _refuse_untrained_embedding(model: DemoTransformer) -> None:
    embed = model.unembed.W_U if isinstance(model.unembed, TiedUnembed) else None
    if embed is not None and not any(
        embed.data_ptr() == parameter.data_ptr() for parameter in model.parameters()
    ):
        raise ValueError(
            "the unembedding is tied to an embedding that was swapped out, and would stay as it "
            "is; swap the unembedding too, or begin with Config(tied_unembed=False)"
        )
