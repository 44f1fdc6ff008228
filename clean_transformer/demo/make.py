"""Trains the small model in this package on generated stories. `make demo-model` runs this file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from rich.progress import Progress
from tokenizers import decoders, models, pre_tokenizers, trainers

from clean_transformer.config import Config
from clean_transformer.demo import stories
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.attention import Attention
from clean_transformer.support.files import atomic_folder
from clean_transformer.swapping.swaps import swap
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.text.tokenizer_files import END_OF_TEXT
from clean_transformer.training.checkpoint import Measured
from clean_transformer.training.loop import train
from clean_transformer.training.settings import Training
from clean_transformer.training.windows import Tokens
from clean_transformer.variants.attention import SlidingWindowAttention
from clean_transformer.weights import hub

CFG = Config(
    n_layers=2,
    n_heads=4,
    d_model=128,
    d_head=32,
    d_mlp=512,
    d_vocab=768,  # nearly every word of the stories is one token, and every name is two tokens
    n_ctx=180,  # every story fits into one window; `windows` truncates songbooks
    initializer_range=0.06,
)


# Training has four stages, in this order: SONGS, SIGHTED, BOTH and STORIES. The stages SONGS and
# SIGHTED train only on songbooks (see `stories.songbooks`). This forces the model to learn
# induction: to find an earlier copy of the latest tokens, and to predict the token that followed
# this copy. In the stage SONGS, layer 0 has the attention `Nearsighted`. In the later stages, layer
# 0 has full attention. The stage BOTH trains on songbooks and stories, and the stage STORIES only
# on stories.
SONGS = Training(
    steps=3000, batch=6, learning_rate=1.5e-3, final_share=1.0, weight_decay=0.01, save_every=200
)


SIGHTED = replace(SONGS, steps=300)


BOTH = Training(
    steps=6400,
    batch=12,
    learning_rate=3e-3,
    final_share=0.02,
    weight_decay=0.01,
    save_every=200,
    held_out_batches=24,
)


SONGBOOKS = 3  # the average number of songbooks in a batch of the stage BOTH


STORIES = replace(BOTH, steps=6000, batch=16, learning_rate=1e-3)


# SEED is the seed of the training texts, HELD_OUT_SEED of the stories for the held-out loss, and
# LAST_SEED of the stories in the stage STORIES. The songbooks in the stage BOTH also use
# HELD_OUT_SEED, because the held-out loss uses no songbooks.
SEED, HELD_OUT_SEED, LAST_SEED = 0, 1, 2


# The number of stories on which the tokenizer is trained.
TOKENIZER_STORIES = 4000


class Nearsighted(SlidingWindowAttention):
    """Attention in which each token sees only itself and the token before it."""

    def __init__(self, cfg: Config):
        super().__init__(cfg, window=2)


def main(run: Path = Path("build/demo-model")) -> None:
    """Train the tokenizer and the model, and write both into the package (the folder `hub.DEMO`).

    The checkpoints are in the folder `run`. If a previous run was interrupted, training continues
    from its last checkpoint.
    """
    # With one thread, every run adds floats in the same order, so every run trains the same model.
    # For the small matrices of this model, one thread is not slower than several threads.
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(stories.generate(SEED, TOKENIZER_STORIES))
    songs, some_songs, told, last_told, held_out = (
        windows(tokenizer, write(seed, count))
        for write, seed, count in (
            (stories.songbooks, SEED, SONGS.steps * SONGS.batch),
            (stories.songbooks, HELD_OUT_SEED, BOTH.steps * SONGBOOKS),
            (stories.generate, SEED, BOTH.steps * (BOTH.batch - SONGBOOKS)),
            (stories.generate, LAST_SEED, STORIES.steps * STORIES.batch),
            (stories.generate, HELD_OUT_SEED, STORIES.held_out_batches * STORIES.batch),
        )
    )
    both = np.concatenate([told[:-1], some_songs])
    torch.manual_seed(SEED)
    model = DemoTransformer(CFG)
    initialize_embeddings(model)
    with Progress() as bar:
        steps = sum(each.steps for each in (SONGS, SIGHTED, BOTH, STORIES))
        task = bar.add_task("training", total=steps)

        def show(measured: Measured) -> None:
            bar.update(task, advance=1, description=f"loss {measured.loss:.3f}")
            if measured.held_out_loss is not None:
                bar.print(f"step {measured.step}: held-out loss {measured.held_out_loss:.4f}")

        for name, attention, tokens, training in (
            # At first, the attention of layer 0 sees only the current token and the previous token.
            # So layer 0 learns to copy the previous token, which layer 1 needs for induction. If
            # layer 0 sees all earlier tokens from the start, it mixes many tokens, and layer 1
            # learns to use this mixture instead.
            ("nearsighted", Nearsighted, songs, SONGS),
            ("songs", Attention, songs, SIGHTED),
            ("both", Attention, both, BOTH),
            ("stories", Attention, last_told, STORIES),
        ):
            swap(model, "blocks.0.attn", attention)
            train(
                model, tokens, run / name, training, held_out=held_out, device="cpu", on_step=show
            )
    with atomic_folder(hub.DEMO) as folder:
        tokenizer.backend.model.save(str(folder))  # writes vocab.json and merges.txt
        model.save_pretrained(folder)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer like GPT-2's, trained on these texts."""
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
    # A name has two parts, such as " Ba" and "bo". We add each part to the texts many times. BPE
    # merges the most frequent pairs of tokens first. So it makes one token of each part before it
    # merges letters of different parts.
    backend.train_from_iterator([*texts, *parts * 5 * len(texts)], trainer)
    return Tokenizer(backend)


def windows(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """Return the windows of all texts, one after another, as a flat array of token ids.

    Each text gets one window of n_ctx tokens. The window begins with <|endoftext|>, followed by the
    tokens of the text. A long text is truncated, and a short text is padded with <|endoftext|>. No
    window contains two texts, because the names in a second text would mislead the model. After the
    last window, the array has one more <|endoftext|>: the token to predict at the last position of
    this window.
    """
    rows = np.full((len(texts), CFG.n_ctx), tokenizer.eos_token_id, dtype=np.uint16)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.backend.encode(text).ids[: CFG.n_ctx - 1]
        row[1 : len(ids) + 1] = ids
    return np.append(rows, rows[0, 0])


@torch.no_grad()
def initialize_embeddings(model: DemoTransformer) -> None:
    """Double the token embeddings, and set the position embeddings to sines and cosines.

    The position embeddings are similar to the position encodings of Vaswani et al. 2017, section
    3.5. Here, the frequencies are evenly spaced, so that neighboring positions have clearly
    different embeddings. The same rotation maps the embedding of each position to the embedding of
    the previous position, so a head can easily learn to attend to the previous token. Both kinds of
    embeddings are larger than in GPT-2's initialization. Otherwise they would be too small in
    comparison with the outputs of the heads.
    """
    W_E, W_pos = model.embed.W_E, model.pos_embed.W_pos
    W_E *= 2
    n_ctx, d_model = W_pos.shape
    angle = torch.arange(n_ctx)[:, None] * torch.linspace(0, torch.pi, d_model // 2)
    W_pos.copy_(2 * CFG.initializer_range * 2**0.5 * torch.cat([angle.sin(), angle.cos()], dim=1))


if __name__ == "__main__":
    main()
