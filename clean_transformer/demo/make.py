"""How the small model that comes with the package was made; `make demo-model` makes it again."""

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
from clean_transformer.text.tokenizer import END_OF_TEXT, Tokenizer
from clean_transformer.training.checkpoint import Measured
from clean_transformer.training.loop import train
from clean_transformer.training.settings import Training
from clean_transformer.training.windows import Tokens
from clean_transformer.variants.attention import SlidingWindowAttention
from clean_transformer.weights.hub import DEMO

CFG = Config(
    n_layers=2,
    n_heads=4,
    d_model=128,
    d_head=32,
    d_mlp=512,
    d_vocab=768,  # nearly all words of the stories are one token, and every name is two
    n_ctx=180,  # more than any story; songbooks are cut
    initializer_range=0.06,
)


# First songs alone, in which nothing helps but looking for what came before; in the end none.
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


SONGBOOKS = 3  # of the texts in a batch of both, on average


STORIES = replace(BOTH, steps=6000, batch=16, learning_rate=1e-3)


SEED, HELD_OUT_SEED, LAST_SEED = 0, 1, 2


TOKENIZER_STORIES = 4000


class Nearsighted(SlidingWindowAttention):
    """Attention to a token itself and the one before it."""

    def __init__(self, cfg: Config):
        super().__init__(cfg, window=2)


def main(run: Path = Path("build/demo-model")) -> None:
    """Train the tokenizer and the model, and put both in the package.

    A run that was broken off goes on from its last checkpoint in `run`.
    """
    torch.set_num_threads(1)  # sums in one order, and no slower for matrices this small
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
    begin(model)
    with Progress() as bar:
        steps = sum(each.steps for each in (SONGS, SIGHTED, BOTH, STORIES))
        task = bar.add_task("training", total=steps)

        def show(measured: Measured) -> None:
            bar.update(task, advance=1, description=f"loss {measured.loss:.3f}")
            if measured.held_out_loss is not None:
                bar.print(f"step {measured.step}: held-out loss {measured.held_out_loss:.4f}")

        for name, attention, tokens, training in (
            # With further sight, layer 0 blurs what it has read, and layer 1 makes do with that.
            # With so little, it can only tell each place its token's predecessor, as induction
            # needs it.
            ("nearsighted", Nearsighted, songs, SONGS),
            ("songs", Attention, songs, SIGHTED),
            ("both", Attention, both, BOTH),
            ("stories", Attention, last_told, STORIES),
        ):
            swap(model, "blocks.0.attn", attention)
            train(
                model, tokens, run / name, training, held_out=held_out, device="cpu", on_step=show
            )
    with atomic_folder(DEMO) as folder:
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
    """For each text a window of n_ctx tokens, cut or filled up with <|endoftext|>, and one more.

    Of one text, since a name of another would lead the search for this one's astray.
    """
    rows = np.full((len(texts), CFG.n_ctx), tokenizer.eos_token_id, dtype=np.uint16)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.backend.encode(text).ids[: CFG.n_ctx - 1]
        row[1 : len(ids) + 1] = ids
    return np.append(rows, rows[0, 0])


@torch.no_grad()
def begin(model: DemoTransformer) -> None:
    """Larger embeddings, and sines and cosines of the position (Vaswani et al. 2017, section 3.5).

    A head finds the previous token by a rotation of these, whose frequencies are spread evenly to
    tell neighbors apart. Of GPT-2's size, the embeddings would drown in what the heads write.
    """
    W_E, W_pos = model.embed.W_E, model.pos_embed.W_pos
    W_E *= 2
    n_ctx, d_model = W_pos.shape
    angle = torch.arange(n_ctx)[:, None] * torch.linspace(0, torch.pi, d_model // 2)
    W_pos.copy_(2 * CFG.initializer_range * 2**0.5 * torch.cat([angle.sin(), angle.cos()], dim=1))


if __name__ == "__main__":
    main()
