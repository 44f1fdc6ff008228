"""Makes the model in `weights/demo/` from nothing: `make demo-model`."""

from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Float
from rich.progress import Progress
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from clean_transformer import stories
from clean_transformer.checkpoint import Measured
from clean_transformer.config import Config
from clean_transformer.data import Tokens
from clean_transformer.files import appearing_whole
from clean_transformer.model import DemoTransformer
from clean_transformer.tokenizer import END_OF_TEXT, Tokenizer
from clean_transformer.train import Training, train
from clean_transformer.weights.hub import DEMO

CFG = Config(
    n_layers=2,
    n_heads=4,
    d_model=128,
    d_head=32,
    d_mlp=512,
    d_vocab=1024,
    n_ctx=320,
    initializer_range=0.06,
)
TRAINING = Training(
    steps=6000, batch=4, learning_rate=3e-3, warmup=50, save_every=200, held_out_batches=25
)
SEED, HELD_OUT_SEED = 0, 1
TOKENIZER_STORIES = 4000


def main(run: Path = Path("build/demo-model")) -> None:
    """Train the tokenizer and the model, and put both in the package.

    A run that was broken off goes on from its last checkpoint in `run`.
    """
    tokenizer = train_tokenizer(stories.generate(SEED, TOKENIZER_STORIES))
    tokens = written(tokenizer, SEED, TRAINING.steps)
    held_out = written(tokenizer, HELD_OUT_SEED, TRAINING.held_out_batches)
    torch.manual_seed(SEED)
    model = DemoTransformer(CFG)
    begin_with_waves(model.pos_embed.W_pos)
    with Progress() as bar:
        task = bar.add_task("training", total=TRAINING.steps)

        def show(measured: Measured) -> None:
            bar.update(task, completed=measured.step, description=f"loss {measured.loss:.3f}")
            if measured.held_out_loss is not None:
                bar.print(f"step {measured.step}: held-out loss {measured.held_out_loss:.3f}")

        train(model, tokens, run, TRAINING, held_out=held_out, device="cpu", on_step=show)
    with appearing_whole(DEMO) as folder:
        tokenizer.backend.model.save(str(folder))  # vocab.json and merges.txt
        model.save_pretrained(folder)


def written(tokenizer: Tokenizer, seed: int, batches: int) -> Tokens:
    """The stories of that seed, enough for so many batches of windows."""
    # No story is longer than a window, so that two always fill one.
    return windows(tokenizer, stories.generate(seed, 2 * batches * TRAINING.batch))


@torch.no_grad()
def begin_with_waves(W_pos: Float[Tensor, "n_ctx d_model"]) -> None:
    """Sines and cosines of the position (Vaswani et al. 2017, section 3.5) to learn on from.

    A head finds the previous token by a rotation of these; from noise, it has to learn the
    neighbours of every position by heart.
    """
    n_ctx, d_model = W_pos.shape
    rate = 10_000 ** -torch.linspace(0, 1, d_model // 2)
    angle = torch.arange(n_ctx)[:, None] * rate
    W_pos.copy_(CFG.initializer_range * 2**0.5 * torch.cat([angle.sin(), angle.cos()], dim=1))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of those texts, as GPT-2's is of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CFG.d_vocab,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def windows(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """Windows of n_ctx tokens side by side, each of which begins with the <|endoftext|> of a story.

    Where a window ends, it leaves the rest of its last story out: training reads whole windows,
    and in each of them every name is told before it is needed.
    """
    ids: list[int] = []
    window: list[int] = []
    for encoding in tokenizer.backend.encode_batch(texts):
        window += [tokenizer.bos_token_id, *encoding.ids]
        if len(window) >= CFG.n_ctx:
            ids += window[: CFG.n_ctx]
            window = []
    return np.array([*ids, tokenizer.bos_token_id], dtype=np.int32)


if __name__ == "__main__":
    main()
