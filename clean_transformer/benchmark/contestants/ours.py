"""What all contestants have in common, and those that are ours."""

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.benchmark.contestants.nanogpt import NanoGPT
from clean_transformer.model import DemoTransformer
from clean_transformer.training.loss import cross_entropy
from clean_transformer.weights.formats.huggingface import read_folder

# How the weights are held while a model is loaded: TF32 is a way to multiply float32, and whoever
# computes with int8 weights makes them from float32.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}


Tokens = Int[Tensor, "batch pos"]


class Contestant:
    """What all have in common: they are made by loading, and do what they can of the rest.

    `forward` gives logits, `generate` new tokens, greedily and without a stop, `capture` every
    activation of a forward pass, and `train_step` trains `model`.
    """

    package = "torch"
    imported = "torch"  # what a user imports
    loss = staticmethod(F.cross_entropy)  # unless it has its own
    model: Any

    def __init__(self, folder: Path, device: str, dtype: str):
        self.folder, self.device, self.dtype = folder, device, dtype

    @property
    def title(self) -> str:
        """The package and its version."""
        return f"{self.package} {version(self.package)}"

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Logits."""
        raise NotImplementedError(f"{type(self).__name__} gives no logits")

    def generate(self, tokens: Tokens, new: int) -> Any:
        """The new tokens."""
        raise NotImplementedError(f"{type(self).__name__} generates nothing")

    def capture(self, tokens: Tokens) -> Any:
        """Logits and cache."""
        raise NotImplementedError(f"{type(self).__name__} keeps no activations")

    def last_logits(self, tokens: Tokens) -> Float[Tensor, "batch d_vocab"]:
        """The logits after each input, to see that it computes the same function."""
        return self.forward(tokens)[:, -1].float().cpu()

    def train_step(self, tokens: Tokens) -> float:
        """Cross-entropy of the next token and a step of AdamW, the same for all."""
        optimizer = self.optimizer
        logits = self.forward(tokens[:, :-1])
        loss = self.loss(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW in one kernel, on the model, which is to be trained from now on."""
        for name, parameter in self.model.train().named_parameters():
            # As `train` does: GPT-2 has no such bias, nor has anybody else here.
            parameter.requires_grad_(name != "unembed.b_U")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)


class Ours(Contestant):
    """`DemoTransformer` as it is."""

    imported = "clean_transformer.model"  # the package itself is lazy
    title = "clean_transformer"
    loss = staticmethod(cross_entropy)

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model = DemoTransformer.from_pretrained(folder, device=device, dtype=DTYPES[dtype])

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Logits."""
        return self.model(tokens, last_only=last_only)

    def generate(self, tokens: Tokens, new: int) -> Any:
        """The new tokens."""
        return self.model.generate(tokens, new)[:, tokens.shape[1] :]

    def capture(self, tokens: Tokens) -> Any:
        """Logits and cache."""
        return self.model.run_with_cache(tokens)


class Optimized(Ours):
    """After `optimize()`."""

    compile = False

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        weights = "int8" if dtype == "int8" else None
        self.handle = self.model.optimize(weights, compile=self.compile)


class OptimizedCompiled(Optimized):
    """After `optimize(compile=True)`, whose decoding step is one graph."""

    compile = True


class Compiled(Ours):
    """Its forward pass under `torch.compile`."""

    generate = Contestant.generate  # each length would be compiled anew

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model.compile(dynamic=any_shape(device))


class Watched(Ours):
    """With attention patterns watched, and so computed step by step, but nothing kept."""

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        for name, point in self.model.hook_points().items():
            if name.endswith("hook_pattern"):
                point.register_forward_hook(lambda *_: None)


class NanoGPTStyle(Contestant):
    """A compact model of nn.Linear modules."""

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        cfg, state = read_folder(folder)
        self.model = NanoGPT.from_huggingface(cfg, state).to(device, DTYPES[dtype])

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Logits."""
        return self.model(tokens)


def any_shape(device: str) -> bool | None:
    """Whether to compile for all shapes at once: on a CPU that takes half a minute, and as fast."""
    return True if device == "cpu" else None


OURS: dict[str, Callable[[Path, str, str], Contestant]] = {
    "ours": Ours,
    "optimized": Optimized,
    "optimized compiled": OptimizedCompiled,
    "compiled": Compiled,
    "watched": Watched,
    "nanoGPT-style": NanoGPTStyle,
}
