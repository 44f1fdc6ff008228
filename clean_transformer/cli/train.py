"""The command that trains."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from clean_transformer.cli.terminal import one_line_errors, training_bar
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.support.devices import resolve_device
from clean_transformer.support.files import atomic_file
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.training.windows import Tokens, load_tokens, tokenize

if TYPE_CHECKING:
    pass


def train(
    data: Annotated[
        list[Path], typer.Argument(help="Text files in UTF-8, or one .npy file of token ids.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command again goes on.")],
    steps: Annotated[int, typer.Option(help="How many steps of the optimizer.")],
    batch: Annotated[int, typer.Option(help="Windows of n_ctx tokens a step, over all devices.")],
    weights: Annotated[
        str | None, typer.Option(help="Begin from a hub id, alias, folder or file.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Or from random weights: small, medium, … Default: small."),
    ] = None,
    n_layers: Annotated[int | None, typer.Option(help="… with other layers,")] = None,
    n_heads: Annotated[int | None, typer.Option(help="… heads,")] = None,
    d_model: Annotated[int | None, typer.Option(help="… width,")] = None,
    n_ctx: Annotated[int | None, typer.Option(help="… positions,")] = None,
    d_vocab: Annotated[int | None, typer.Option(help="… or vocabulary.")] = None,
    tokenizer: Annotated[str, typer.Option(help="For texts: a folder, hub id or alias.")] = "gpt2",
    held_out: Annotated[
        Path | None, typer.Option(help="A file like the data. Default: the data's last tenth.")
    ] = None,
    accumulation: Annotated[int, typer.Option(help="Parts of each device's windows.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 6e-4,
    warmup: Annotated[int, typer.Option(help="Steps up to it; a cosine leads down.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="The largest norm of the gradients.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of random weights and of the data's order.")] = 0,
    autocast: Annotated[bool, typer.Option("--autocast", help="Compute in bfloat16.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Save memory: gradient checkpointing per block.")
    ] = False,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="A part of each parameter on each device.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    held_out_every: Annotated[int, typer.Option(help="Steps between held-out losses.")] = 500,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, …")] = "auto",
) -> None:
    """Train a GPT-2 to predict the next token; with `torchrun --no-python`, on many devices.

    Writes checkpoint.pt, metrics.jsonl and at the end model/, in Hugging Face's format.
    """
    from clean_transformer.training.distributed import joined, rank
    from clean_transformer.training.loop import train as train_model
    from clean_transformer.training.settings import Training

    with one_line_errors(), joined(resolve_device(device)) as chosen:
        sizes = {
            "--size": size,
            "--n-layers": n_layers,
            "--n-heads": n_heads,
            "--d-model": d_model,
            "--n-ctx": n_ctx,
            "--d-vocab": d_vocab,
        }
        given = ", ".join(name for name, value in sizes.items() if value is not None)
        if weights is not None and given:
            raise ValueError(f"{weights} has its own size; leave out {given}, or --weights")
        training = Training(
            steps=steps,
            batch=batch,
            accumulation=accumulation,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            seed=seed,
            autocast=autocast,
            recompute=recompute,
            sharded=sharded,
            save_every=save_every,
            held_out_every=held_out_every,
        )
        of_text = None if data[0].suffix == ".npy" else Tokenizer.from_pretrained(tokenizer)
        tokens = read(data, of_text)
        kept = len(tokens) if held_out else len(tokens) * 9 // 10
        other = tokens[kept:] if held_out is None else read([held_out], of_text)
        torch.manual_seed(seed)
        if weights is None:
            vocabulary = of_text.d_vocab if of_text and d_vocab is None else d_vocab
            cfg = architecture(size or "small", n_layers, n_heads, d_model, n_ctx, vocabulary)
            model = DemoTransformer(cfg)
        else:
            model = DemoTransformer.from_pretrained(weights, device="cpu")
        with training_bar(steps) as on_step:
            train_model(
                model,
                tokens[:kept],
                out,
                training,
                held_out=other,
                device=chosen,
                on_step=on_step,
            )
        if rank() == 0:
            # The model itself may be in shards.
            saved = torch.load(out / "checkpoint.pt", weights_only=True, mmap=True)
            whole = DemoTransformer.from_state_dict(saved["model"], model.cfg)
            whole.save_pretrained(out / "model")
            if of_text is not None:
                with atomic_file(out / "model/tokenizer.json") as unfinished:
                    of_text.backend.save(str(unfinished))
            print(f"wrote {out / 'model'}")


def read(files: list[Path], tokenizer: Tokenizer | None) -> Tokens:
    """The tokens of text files, or without a tokenizer of one token file."""
    if tokenizer is not None:
        return tokenize(files, tokenizer)
    if len(files) > 1:
        raise ValueError(f"there are {len(files)} files, of which one holds tokens; give that one")
    return load_tokens(files[0])


def architecture(
    size: str,
    n_layers: int | None = None,
    n_heads: int | None = None,
    d_model: int | None = None,
    n_ctx: int | None = None,
    d_vocab: int | None = None,
) -> Config:
    """The published one of that size, but for what is given. Heads share the width."""
    given = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_model": d_model,
        "n_ctx": n_ctx,
        "d_vocab": d_vocab,
    }
    cfg = Config.gpt2(size, **{name: n for name, n in given.items() if n is not None})
    if cfg.d_model % cfg.n_heads:
        raise ValueError(f"{cfg.n_heads} heads cannot share a width of {cfg.d_model} equally")
    return replace(cfg, d_head=cfg.d_model // cfg.n_heads, d_mlp=4 * cfg.d_model)
