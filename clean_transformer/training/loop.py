"""`train`: trains a model to predict the next token, on one or several devices."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import AdamW

from clean_transformer.model import DemoTransformer
from clean_transformer.support.devices import resolve_device
from clean_transformer.training import checkpoint
from clean_transformer.training.checkpoint import Measured, Metrics
from clean_transformer.training.distributed import (
    accumulating,
    distribute,
    mean_over_processes,
    n_processes,
    rank,
)
from clean_transformer.training.identity import describe, first_weights
from clean_transformer.training.loss import cross_entropy
from clean_transformer.training.settings import Training
from clean_transformer.training.temporary import (
    deterministic_kernels,
    random_generators,
    recomputed_blocks,
    training_state,
)
from clean_transformer.training.windows import Tokens, as_array, refuse_tokens, window


def train(
    model: DemoTransformer,
    tokens: Tokens | Tensor | Sequence[int],
    folder: str | Path,
    training: Training,
    *,
    held_out: Tokens | Tensor | Sequence[int] | None = None,
    device: str | torch.device = "auto",
    on_step: Callable[[Measured], object] = lambda measured: None,
) -> None:
    """Train the model in place, or resume the run that was saved in `folder`.

    `tokens` [pos] and `held_out` [pos] are arrays, tensors or lists of token ids, for example a
    memory-mapped uint16 array. `model` is moved to `device`. Some of its modules may have been
    replaced with `swap`. `train` writes two files into `folder`: checkpoint.pt, and metrics.jsonl
    with one JSON object per step. After each step, `train` calls `on_step` with the measurements of
    the step.

    If the run is killed at any moment, the same call resumes the run from the last checkpoint. The
    trained parameters then equal the parameters of an uninterrupted run, bit for bit. For this
    reason, the tokens of a step depend only on `training.seed` and the number of the step. The
    random generators are seeded before each step with `training.seed`, the number of the step and
    the rank of the process. If the run is finished already, the model only gets the trained
    parameters. The warning `WeightsReplaced` says that the run began with other parameters than
    `model` has.

    If `torch.distributed` is initialized (see `distributed.joined`), all processes train together,
    and only process 0 calls `on_step`. With `training.sharded`, each process still holds only a
    part of every parameter after training, but the checkpoint holds whole parameters.

    `unembed.b_U` is not trained, because GPT-2 has no such bias. At the end, `train` restores each
    parameter's `requires_grad` and `grad`, each module's train or eval mode, and PyTorch's random
    state and settings for deterministic algorithms.

    Raises `ValueError`, before training starts, for tokens outside the vocabulary, for too few
    tokens, and for a batch that cannot be divided equally among the processes. Raises `ValueError`
    if `folder` has other files, or a checkpoint of a run with other settings, tokens or modules.
    Raises `ValueError` for float16 parameters, and if the unembedding is tied to an embedding that
    is no longer in the model. Raises `BlockingIOError` if another process trains in `folder`.
    Raises `RuntimeError` if the gradient norm is not finite. The last checkpoint is then kept.
    """
    folder, device = Path(folder), resolve_device(device)
    tokens = as_array(tokens)
    held_out = None if held_out is None else as_array(held_out)
    windows_per_process(training)  # called only for its errors
    refuse_untrained_embedding(model)
    refuse_float16(model)
    refuse_tokens("the tokens", tokens, model.cfg)
    if held_out is not None:
        refuse_tokens("the held-out tokens", held_out, model.cfg)
    about = describe(model, training, tokens, held_out)
    checkpoint.refuse_other_folder(folder)
    saved = checkpoint.read(folder, about, model.state_dict(), training.steps)
    start = first_weights(saved, model.state_dict(), folder, training.steps)

    with (
        checkpoint.claimed(folder) if rank() == 0 else nullcontext(),
        training_state(model),
        random_generators(device) as generators,
        deterministic_kernels(),
        recomputed_blocks(model) if training.recompute else nullcontext(),
    ):
        engine = distribute(model, device, sharded=training.sharded)
        optimizer = adamw(model, training)
        done = 0 if saved is None else checkpoint.restore(saved, engine, optimizer)
        metrics = Metrics(folder, done) if rank() == 0 else None
        for step in range(done, training.steps):
            began = perf_counter()
            for generator in generators:
                generator.manual_seed(seed_of(training.seed, step, rank()))
            windows = own_windows(tokens, step, model.cfg.n_ctx, training).to(device)
            loss, norm = update(engine, optimizer, windows, training, step)
            if not math.isfinite(norm):
                raise RuntimeError(
                    f"the gradient norm is {norm} in step {step + 1}; {folder} keeps the last "
                    "checkpoint: train in another folder, with a lower learning rate or from there"
                )
            seconds = perf_counter() - began
            held_out_loss = None
            if held_out is not None and training.is_due(training.held_out_every, step):
                batches = (
                    own_windows(held_out, number, model.cfg.n_ctx, training).to(device)
                    for number in range(training.held_out_batches)
                )
                held_out_loss = evaluate(engine, batches, training)
            if metrics is not None:
                speed = training.batch * model.cfg.n_ctx / seconds
                measured = Measured(step + 1, loss, norm, training.rate(step), speed, held_out_loss)
                metrics.add(measured)
                on_step(measured)
            if training.is_due(training.save_every, step):
                checkpoint.save(folder, engine, optimizer, step + 1, about, start)


def windows_per_process(training: Training) -> int:
    """Return how many training windows each process reads in one batch.

    Raises `ValueError` if a batch cannot be divided equally among the processes and micro-batches,
    and for `training.sharded` with only one process.
    """
    parts = n_processes() * training.accumulation
    if training.batch % parts:
        raise ValueError(
            f"a batch of {training.batch} windows is not divisible by {n_processes()} processes × "
            f"{training.accumulation} micro-batches; use a multiple of {parts}"
        )
    if training.sharded and n_processes() == 1:
        raise ValueError(
            "sharded needs several processes, and this is the only one; start them with torchrun"
        )
    return training.batch // n_processes()


def refuse_untrained_embedding(model: DemoTransformer) -> None:
    """Raise `ValueError` if the unembedding is tied to an embedding that is not in the model."""
    if model.swapped_out_embedding is not None:
        raise ValueError(
            "the unembedding is tied to an embedding that was swapped out, and would not be "
            "trained; swap the unembedding too, or begin with Config(tied_unembed=False)"
        )


def refuse_float16(model: DemoTransformer) -> None:
    """Raise `ValueError` for parameters in float16, where AdamW's eps is 0, so it divides by 0."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is in float16, in which AdamW's eps of 1e-8 is 0 and the weights become "
                "NaN; call model.float(), and set autocast=True to compute in bfloat16"
            )


def seed_of(*numbers: int) -> int:
    """Return a 64-bit seed that depends on all of `numbers`, and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def own_windows(
    tokens: Tokens, batch: int, n_ctx: int, training: Training
) -> Int[Tensor, "window pos"]:
    """Return this process's share of the windows of batch number `batch`, counted from 0.

    A window has the n_ctx + 1 token ids of one training example.
    """
    share = windows_per_process(training)
    first = batch * training.batch + rank() * share
    numbers = range(first, first + share)
    return torch.stack([window(tokens, number, n_ctx, training.seed) for number in numbers])


def adamw(model: nn.Module, training: Training) -> AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) for the parameters that require gradients.

    Weight decay applies only to matrices, not to biases or LayerNorm gains. A parameter counts as a
    matrix if it has two or more axes and its name does not begin with "b". The name matters because
    some biases, such as b_Q, have two axes.
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
    """Take one optimizer step, and return the loss and the gradient norm.

    `windows` is this process's share of the batch. The loss and the gradients are means over the
    windows of all processes. The gradient norm is measured before clipping. `step` counts from 0.
    """
    engine.train()
    parts = windows.chunk(training.accumulation)
    total = torch.zeros((), device=windows.device, dtype=torch.float64)
    for number, part in enumerate(parts):
        with nullcontext() if number + 1 == len(parts) else accumulating(engine):
            loss = next_token_loss(engine, part, training) / len(parts)
            torch.autograd.backward(loss)
        total += loss.detach()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # a swapped module may not use this parameter
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.clip_grad_norm_(parameters, training.clip)
    for group in optimizer.param_groups:
        group["lr"] = training.rate(step)
    optimizer.step()
    optimizer.zero_grad()
    norm = norm.full_tensor() if training.sharded else norm  # type: ignore[attr-defined]
    return mean_over_processes(total), norm.item()


def next_token_loss(
    engine: nn.Module, windows: Int[Tensor, "window pos"], training: Training
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy per predicted token, in nats.

    The model predicts each token of a window, except the first token, from the tokens before it.
    """
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=training.autocast):
        logits = engine(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(
    engine: nn.Module, batches: Iterable[Int[Tensor, "window pos"]], training: Training
) -> float:
    """Return the mean loss over `batches` and over all processes, in nats per token.

    Each element of `batches` is this process's share of the windows of one batch.
    """
    engine.eval()
    losses = [
        next_token_loss(engine, part, training).double()
        for windows in batches
        for part in windows.chunk(training.accumulation)
    ]
    return mean_over_processes(torch.stack(losses).mean())
