"""The command `clean-transformer train`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import progress
from clean_transformer.config import Config
from clean_transformer.training.settings import Training

if TYPE_CHECKING:
    from clean_transformer.text.tokenizer import Tokenizer
    from clean_transformer.training.checkpoint import Measured
    from clean_transformer.training.windows import Tokens

SIZES = "The model, with random weights"


@options.options_from(Training, panel="How to train")
def train(
    data: Annotated[
        list[Path],
        typer.Argument(help="Text files in UTF-8, or one .npy file of token ids."),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            help="The folder of the run. If it has a checkpoint, training resumes from there."
        ),
    ],
    held_out: Annotated[
        Path | None,
        typer.Option(help="A held-out file like the data. Default: the last tenth of the data."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help=f"{options.TOKENIZER} It encodes the text files. Default: that of --weights, or "
            "gpt2 without --weights."
        ),
    ] = None,
    device: options.Device = "auto",
    weights: Annotated[
        str | None,
        typer.Option(help=f"Start from existing weights instead of random ones. {options.WEIGHTS}"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="A published size: small, medium, large or xl. Default: small.",
            rich_help_panel=SIZES,
        ),
    ] = None,
    n_layers: Annotated[
        int | None, typer.Option(help="Number of layers.", rich_help_panel=SIZES)
    ] = None,
    n_heads: Annotated[
        int | None, typer.Option(help="Number of attention heads per layer.", rich_help_panel=SIZES)
    ] = None,
    d_model: Annotated[
        int | None, typer.Option(help="Width of the residual stream.", rich_help_panel=SIZES)
    ] = None,
    n_ctx: Annotated[
        int | None, typer.Option(help="Number of positions.", rich_help_panel=SIZES)
    ] = None,
    d_vocab: Annotated[
        int | None,
        typer.Option(
            help="Size of the vocabulary. Default for text files: the tokenizer's.",
            rich_help_panel=SIZES,
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Train a GPT-2 to predict the next token.

    Writes checkpoint.pt and metrics.jsonl in the folder of the run, and at
    the end model/, in Hugging Face's format.

    On 8 GPUs: torchrun --nproc-per-node 8 --no-python clean-transformer train …

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    import torch

    from clean_transformer.model import DemoTransformer
    from clean_transformer.support.devices import resolve_device
    from clean_transformer.support.files import require_output_folder
    from clean_transformer.text.tokenizer import Tokenizer
    from clean_transformer.training.distributed import joined, rank
    from clean_transformer.training.loop import train

    training = Training(**settings)
    for file in [*data, held_out]:
        if file is not None:
            file.open("rb").close()  # a missing file is reported before the tokenizer is loaded
    require_output_folder(out)
    sizes = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_model": d_model,
        "n_ctx": n_ctx,
        "d_vocab": d_vocab,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    if weights is not None and (given or size):
        named = ["size"] * (size is not None) + [*given]
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in named)
        raise ValueError(f"--weights {weights} has a size of its own; leave out {flags}")
    is_text = data[0].suffix != ".npy"
    if tokenizer is not None and not is_text:
        raise ValueError(
            f"--tokenizer is for text files, and {data[0]} has token ids; leave it out"
        )
    with joined(resolve_device(device)) as chosen:
        of_text = Tokenizer.from_pretrained(tokenizer or weights or "gpt2") if is_text else None
        tokens = read_tokens(data, of_text)
        kept = len(tokens) if held_out else len(tokens) * 9 // 10
        other = tokens[kept:] if held_out is None else read_tokens([held_out], of_text)
        torch.manual_seed(training.seed)
        if weights is not None:
            model = DemoTransformer.from_pretrained(weights, device="cpu")
        else:
            if of_text is not None:
                given.setdefault("d_vocab", of_text.d_vocab)
            model = DemoTransformer(architecture(size or "small", **given))
        steps: list[int] = []
        with progress(training.steps, logged=True) as on_step:

            def show(measured: "Measured") -> None:
                speed = f"{measured.tokens_per_second:,.0f} tokens/s"
                loss = f"loss {measured.loss:.3f}"
                if measured.held_out_loss is not None:
                    loss += f", held out {measured.held_out_loss:.3f}"
                on_step(f"{loss}, {speed}", measured.step)
                steps.append(measured.step)

            train(model, tokens[:kept], out, training, held_out=other, device=chosen, on_step=show)
        if rank() == 0:
            if not steps:
                print(f"the run in {out} was finished already; nothing was trained")
            # `model` may be sharded over several processes, so that this process has only some of
            # the weights. The checkpoint has all weights.
            saved = torch.load(out / "checkpoint.pt", weights_only=True, mmap=True)
            whole = DemoTransformer.from_state_dict(saved["model"], model.cfg)
            if of_text is not None:
                whole.tokenizer = of_text
            whole.save_pretrained(out / "model")
            print(f"wrote {out / 'model'}")


def read_tokens(files: list[Path], tokenizer: "Tokenizer | None") -> "Tokens":
    """Return the token ids of text files, or of one .npy file if `tokenizer` is None.

    Raises `ValueError` if `tokenizer` is None and there are several files.
    """
    from clean_transformer.training.windows import load_tokens, tokenize

    if tokenizer is not None:
        return tokenize(files, tokenizer)
    if len(files) > 1:
        raise ValueError(f"there are {len(files)} files; give one .npy file of all the token ids")
    return load_tokens(files[0])


def architecture(size: str, **changes: int) -> Config:
    """Return the architecture of the published `size`, with the fields in `changes` replaced.

    As in every published GPT-2, d_head is d_model / n_heads, and d_mlp is 4 × d_model. Raises
    `ValueError` if d_model is not a multiple of n_heads.
    """
    cfg = Config.gpt2(size, **changes)
    if cfg.d_model % cfg.n_heads:
        raise ValueError(f"{cfg.n_heads} heads cannot share a width of {cfg.d_model} equally")
    return replace(cfg, d_head=cfg.d_model // cfg.n_heads, d_mlp=4 * cfg.d_model)
