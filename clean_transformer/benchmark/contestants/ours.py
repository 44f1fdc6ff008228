"""Our own contestants, and a compact model in the style of nanoGPT."""

from pathlib import Path
from typing import Any

from clean_transformer.benchmark.contestants.base import DTYPES, Contestant, Tokens, any_shape
from clean_transformer.benchmark.contestants.nanogpt import NanoGPT
from clean_transformer.model import DemoTransformer
from clean_transformer.training.loss import cross_entropy
from clean_transformer.weights.formats.huggingface import read_folder


class Ours(Contestant):
    """`DemoTransformer` as it is."""

    imported = "clean_transformer.model"
    title = "clean_transformer"
    loss = staticmethod(cross_entropy)

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model = DemoTransformer.from_pretrained(folder, device=device, dtype=DTYPES[dtype])

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Logits for all positions; with `last_only`, only for the last position."""
        return self.model(tokens, last_only=last_only)

    def generate(self, tokens: Tokens, new: int) -> Any:
        """The new tokens [batch new]."""
        return self.model.generate(tokens, new)[:, tokens.shape[1] :]

    def capture(self, tokens: Tokens) -> Any:
        """The logits, and a cache of all activations."""
        return self.model.run_with_cache(tokens)


class Optimized(Ours):
    """`DemoTransformer` after `optimize()`."""

    compile = False

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        weights = "int8" if dtype == "int8" else None
        self.handle = self.model.optimize(weights, compile=self.compile)


class OptimizedCompiled(Optimized):
    """`DemoTransformer` after `optimize(compile=True)`: its decoding step is one graph."""

    compile = True


class Compiled(Ours):
    """`DemoTransformer` with its forward pass under `torch.compile`."""

    generate = Contestant.generate  # not measured: it would compile again for each length

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model.compile(dynamic=any_shape(device))


class Watched(Ours):
    """`DemoTransformer` with a hook on every pattern, so that attention is computed explicitly.

    The hooks store nothing. So the time of `capture` minus the time of this contestant is the cost
    of storing the activations.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        for name, point in self.model.hook_points().items():
            if name.endswith("hook_pattern"):
                point.register_forward_hook(lambda *_: None)


class NanoGPTStyle(Contestant):
    """A compact model of `nn.Linear` modules."""

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        cfg, state = read_folder(folder)
        self.model = NanoGPT.from_huggingface(cfg, state).to(device, DTYPES[dtype])

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Logits for all positions, also with `last_only`."""
        return self.model(tokens)
