"""Makes the model in `weights/demo/`: `python -m clean_transformer.demo [folder]`, or
`make demo-model`."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Float, Int
from rich.progress import track
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy

from clean_transformer import stories
from clean_transformer.config import Config
from clean_transformer.files import appearing_whole
from clean_transformer.model import DemoTransformer
from clean_transformer.tokenizer import END_OF_TEXT, Tokenizer
from clean_transformer.weights.hub import DEMO

CFG = Config(n_layers=3, n_heads=4, d_model=128, d_head=32, d_mlp=512, d_vocab=1024, n_ctx=320)
TRAINING_SEED, HELD_OUT_SEED = 0, 1
BATCH, STEPS, WARM_UP, LEARNING_RATE = 8, 2200, 50, 3e-3


def main(folder: Path = DEMO) -> None:
    """Train the tokenizer and the model from their seed, and print the loss on other stories."""
    torch.manual_seed(TRAINING_SEED)
    # A row holds less than two stories, and is begun with a new one.
    texts = stories.generate(TRAINING_SEED, 2 * BATCH * STEPS)
    with appearing_whole(folder) as unfinished:
        tokenizer = train_tokenizer(texts[:4000], unfinished)
        model = DemoTransformer(CFG)
        train(model, rows(tokenizer, texts))
        model.save_pretrained(unfinished)
    held_out = rows(tokenizer, stories.generate(HELD_OUT_SEED, 400))
    with torch.no_grad():
        print(f"loss on stories of another seed: {loss(model, held_out):.3f} nats per token")


def train_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    """A byte-level BPE of those texts, written as GPT-2's is: vocab.json and merges.txt."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CFG.d_vocab,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.model.save(str(folder))
    return Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt")


def rows(tokenizer: Tokenizer, texts: list[str]) -> Int[Tensor, "row n_ctx+1"]:
    """Rows that begin with a story's <|endoftext|> and go on with the next one's until full."""

    def full() -> Iterator[list[int]]:
        row: list[int] = []
        for encoding in tokenizer.backend.encode_batch(texts):
            row += [tokenizer.bos_token_id, *encoding.ids]
            if len(row) > CFG.n_ctx:
                yield row[: CFG.n_ctx + 1]
                row = []

    return torch.tensor([*full()])


def loss(model: DemoTransformer, tokens: Int[Tensor, "row n_ctx+1"]) -> Float[Tensor, ""]:
    """The mean cross-entropy of each next token, in nats."""
    logits = model(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: DemoTransformer, tokens: Int[Tensor, "row n_ctx+1"]) -> None:
    """One pass over the rows with AdamW, whose rate warms up, then falls as a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / STEPS)) / 2 + 0.01),
    )
    for batch in track(tokens[: BATCH * STEPS].split(BATCH), "training"):
        optimizer.zero_grad()
        batch_loss = loss(model, batch)
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
