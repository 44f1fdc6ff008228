"""How the small model that comes with the package was made; `make demo-model` makes it again."""

from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Float
from rich.progress import Progress
from tokenizers import decoders, models, pre_tokenizers, trainers
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
    d_vocab=768,  # all words of the stories but two are one token, and every name is two
    n_ctx=164,  # the longest story, and <|endoftext|> around it
    initializer_range=0.06,
)
TRAINING = Training(
    steps=4000,
    batch=16,
    learning_rate=3e-3,
    final_share=0.02,
    weight_decay=0.01,
    save_every=200,
    held_out_batches=12,
)
SEED, HELD_OUT_SEED = 0, 1
TOKENIZER_STORIES = 4000


def main(run: Path = Path("build/demo-model")) -> None:
    """Train the tokenizer and the model, and put both in the package.

    A run that was broken off goes on from its last checkpoint in `run`.
    """
    torch.set_num_threads(1)  # sums in one order, and no slower for matrices this small
    tokenizer = train_tokenizer(stories.generate(SEED, TOKENIZER_STORIES))
    batches = {SEED: TRAINING.steps, HELD_OUT_SEED: TRAINING.held_out_batches}
    tokens, held_out = (
        windows(tokenizer, stories.generate(seed, count * TRAINING.batch))
        for seed, count in batches.items()
    )
    torch.manual_seed(SEED)
    model = DemoTransformer(CFG)
    begin_with_waves(model.pos_embed.W_pos)
    with Progress() as bar:
        task = bar.add_task("training", total=TRAINING.steps)

        def show(measured: Measured) -> None:
            bar.update(task, completed=measured.step, description=f"loss {measured.loss:.3f}")
            if measured.held_out_loss is not None:
                bar.print(f"step {measured.step}: held-out loss {measured.held_out_loss:.4f}")

        train(model, tokens, run, TRAINING, held_out=held_out, device="cpu", on_step=show)
    with appearing_whole(DEMO) as folder:
        tokenizer.backend.model.save(str(folder))  # vocab.json and merges.txt
        model.save_pretrained(folder)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of those texts, as GPT-2's is of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CFG.d_vocab,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    starts = stories.RULES["hero_start"] + stories.RULES["friend_start"]
    parts = [f" {start}" for start in starts] + stories.RULES["hero_end"]
    # So often by themselves, these become tokens before any letters across them do.
    backend.train_from_iterator([*texts, *parts * 5 * len(texts)], trainer)
    return Tokenizer(backend)


def windows(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """For each story a window of n_ctx tokens, filled up with <|endoftext|>, and one token more.

    Of one story, since a name of another would lead the search for this one's astray.
    """
    rows = np.full((len(texts), CFG.n_ctx), tokenizer.eos_token_id, dtype=np.uint16)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.backend.encode(text).ids
        row[1 : len(ids) + 1] = ids
    return np.append(rows, rows[0, 0])


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


if __name__ == "__main__":
    main()
