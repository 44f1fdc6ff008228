"""Contestants that run our own model, and a compact model in the style of nanoGPT."""

from pathlib import Path
from typing import Any

from clean_transformer.benchmark.contestants.base import DTYPES, Contestant, Tokens, any_shape
from clean_transformer.benchmark.contestants.nanogpt import NanoGPT
from clean_transformer.model import DemoTransformer
from clean_transformer.training.loss import cross_entropy
from clean_transformer.weights.formats.huggingface import read_folder


class Ours(Contestant):
    """`DemoTransformer` without `optimize` and without `torch.compile`."""

    imported = "clean_transformer.model"
    title = "clean_transformer"
    loss = staticmethod(cross_entropy)

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model = DemoTransformer.from_pretrained(folder, device=device, dtype=DTYPES[dtype])

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions; with `last_only`, only for the last position."""
        return self.model(tokens, last_only=last_only)

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        return self.model.generate(tokens, new)[:, tokens.shape[1] :]

    def capture(self, tokens: Tokens) -> Any:
        """Run a forward pass, and return the logits and a cache of all activations."""
        return self.model.run_with_cache(tokens)


class Optimized(Ours):
    """`DemoTransformer` after `optimize()`; in int8, after `optimize("int8")`."""

    compile = False

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        weights = "int8" if dtype == "int8" else None
        self.handle = self.model.optimize(weights, compile=self.compile)


class OptimizedCompiled(Optimized):
    """`DemoTransformer` after `optimize(compile=True)`. A decoding step is one compiled graph."""

    compile = True


class Compiled(Ours):
    """`DemoTransformer` whose forward pass is compiled by `torch.compile`."""

    generate = Contestant.generate  # not measured, because each length would compile again

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model.compile(dynamic=any_shape(device))


class Watched(Ours):
    """`DemoTransformer` with a hook on every attention pattern.

    These hooks make the model compute attention explicitly, without a fused kernel, as the model
    also does in `Ours.capture`. But the hooks store nothing. So the time of `Ours.capture` minus
    the time of `Watched.forward` is the time that storing the activations takes.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        for name, point in self.model.hook_dict.items():
            if name.endswith("hook_pattern"):
                point.register_forward_hook(lambda *_: None)


class NanoGPTStyle(Contestant):
    """The compact model `NanoGPT`: GPT-2 in a few `nn.Linear` modules, without hooks."""

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        cfg, state = read_folder(folder)
        self.model = NanoGPT.from_huggingface(cfg, state).to(device, DTYPES[dtype])

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions, even with `last_only`."""
        return self.model(tokens)
