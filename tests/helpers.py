"""Small models, a watched `TransformerLens`, and the bounds that tests compare by."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import getclosurevars, unwrap
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import strategies as st
from jaxtyping import config
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.func import functional_call

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.base import Reference
from clean_transformer.text.tokenizer import END_OF_TEXT, Tokenizer
from clean_transformer.weights.table import Format

# Files of the published GPT-2, beside this repository on some machines.
GPT2 = Path(__file__).parents[2] / "shared" / "gpt2"

# No two axes are equally long, so that nothing fits where it does not belong.
TINY = Config(n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=20, d_vocab=31, n_ctx=10)


def tiny(**changes) -> Config:
    return replace(TINY, **changes)


def configs(**fixed) -> st.SearchStrategy[Config]:
    """Architectures that every format can hold, unless `fixed` says otherwise."""

    @st.composite
    def draw_config(draw) -> Config:
        n_heads, d_head = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        lengths = {
            name: draw(st.integers(1, 6)) for name in ("n_layers", "d_mlp", "d_vocab", "n_ctx")
        }
        sizes = {"n_heads": n_heads, "d_head": d_head, "d_model": n_heads * d_head}
        others = {
            "eps": draw(st.sampled_from([1e-5, 1e-3])),
            "initializer_range": draw(st.sampled_from([0.02, 0.3])),
            "tied_unembed": draw(st.booleans()),
        }
        return Config(**(sizes | lengths | others | fixed))

    return draw_config()


def random_model(
    cfg: Config = TINY, *, dtype: torch.dtype = torch.float64, seed: int = 0, b_U: bool = False
) -> DemoTransformer:
    """Every parameter random, so that no gain of 1 or bias of 0 can be left out unnoticed.

    Except b_U, unless asked for: Hugging Face's format has no place for it.
    """
    generator = torch.Generator().manual_seed(seed)
    model = DemoTransformer(cfg).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if b_U or name != "unembed.b_U":
                parameter.normal_(std=0.3, generator=generator)
    return model


def random_state(known: Format, cfg: Config) -> dict[str, Tensor]:
    """Random parameters, but zeros where the format has no place for them."""
    state = random_model(cfg, b_U=True).state_dict()
    return {
        row.ours: state[row.ours] if row.theirs else torch.zeros_like(state[row.ours])
        for row in known.rows(cfg)
    }


def trained(**special: str) -> tokenizers.Tokenizer:
    """A byte-level BPE like GPT-2's, of 270 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=[special.get("end", END_OF_TEXT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, then the other cat sat there"], trainer)
    return backend


def reading_model(*, b_U: bool = True, seed: int = 0, **changes) -> DemoTransformer:
    """A small random model in float32 that has a tokenizer."""
    cfg = tiny(**{"d_vocab": 270, "n_ctx": 60} | changes)
    model = random_model(cfg, dtype=torch.float32, b_U=b_U, seed=seed)
    model.tokenizer = Tokenizer(trained())
    return model


def random_tokens(cfg: Config = TINY, batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cfg.d_vocab, (batch, length), generator=generator)


def random_tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed)).to(dtype)


def randomized(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module in that dtype, with every parameter random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.to(dtype)


def assert_same_function(ours: Tensor, theirs: Tensor) -> None:
    """Agreement to 1e-12 of the scale in float64: rounding leaves some 1e-15, other formulas 1e-8.

    That is 4,504 units of float64's last place; another dtype gets as many of its own.
    """
    assert ours.shape == theirs.shape
    tolerance = 1e-12 / torch.finfo(torch.float64).eps * torch.finfo(ours.dtype).eps
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    scale = theirs.square().mean().sqrt()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(tolerance * scale))


def assert_equal_states(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_gradients(module: nn.Module, *inputs: Tensor) -> None:
    """Back-propagation agrees with finite differences, for every parameter and float input."""
    names = [name for name, _ in module.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)

    def run(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=False))
        return functional_call(module, parameters, values[len(names) :])

    assert torch.autograd.gradcheck(run, (*values, *inputs))


class Rounding:
    """How far apart rounding may take two runs of AdamW (betas 0.9 and 0.95), element by element.

    Where two sequences of gradients g differ by δ or less, so do their means m̂, and their root mean
    squares √v̂, which is a norm. The step m̂ / (√v̂ + ε) then differs by δ (1 + C) / (√v̂ + ε) or less,
    where |m̂| ≤ C √v̂ by Cauchy and Schwarz; in ten steps C is 1.02 or less. To first order the
    differences add up. Rounding in float64 leaves δ ≤ 1e-12 of the largest gradient.
    """

    def __init__(self) -> None:
        self.allowed: dict[str, Tensor] = {}

    def add(
        self, step: int, rate: float, gradient: float, exp_avg_sq: Mapping[str, Tensor]
    ) -> None:
        """One step more, from 0, whose gradients are no larger than `gradient`."""
        for name, squares in exp_avg_sq.items():
            root = (squares / (1 - 0.95 ** (step + 1))).sqrt()
            moved = rate * 2.02 * 1e-12 * gradient / (root + 1e-8)
            self.allowed[name] = self.allowed.get(name, 0) + moved


def watch_everything(module: nn.Module) -> None:
    """Put a hook on every hook point, so that the module takes its explicit path."""
    for point in module.hook_points().values():
        point.register_forward_hook(lambda *_: None)


@dataclass(frozen=True)
class Watched:
    """A reference with 12 layers that has run, and what it cached, under our names."""

    cfg: Config
    state: Mapping[str, Tensor]
    tokens: Tensor
    cache: Mapping[str, Tensor]

    def normalized(self, layer_norm: str) -> Tensor:
        """What a LayerNorm gives on.

        `HookedTransformer` caches it before gain and bias only, and ln1's once per head, all equal.
        """
        if layer_norm in self.cache:
            return self.cache[layer_norm]
        normalized = self.cache[f"{layer_norm}.hook_normalized"]
        if normalized.ndim == 4:
            normalized = normalized[:, :, 0]
        return normalized * self.state[f"{layer_norm}.w"] + self.state[f"{layer_norm}.b"]

    def with_weights(self, module: nn.Module, path: str) -> nn.Module:
        """The module, with the reference's weights of that path."""
        prefix = f"{path}." if path else ""
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix)
        }
        module.double().load_state_dict(weights)
        return module


def reference_model(reference: Reference) -> nn.Module:
    """The other implementation's model, which a `Reference` keeps to itself."""
    variables = getclosurevars(unwrap(reference.run)).nonlocals
    return variables["bridge"] if "bridge" in variables else variables["model"]


def needs(kind: str, installed: str) -> None:
    """Skip a test of another version of TransformerLens than the one that is installed."""
    if kind not in (installed, "huggingface"):
        pytest.skip(f"the reference {kind!r} needs another transformer_lens than {installed!r}")


@contextmanager
def unchecked_types() -> Iterator[None]:
    """As users run it: without the types of signatures checked, so that our own errors show."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


def needs_gpt2(name: str) -> pytest.MarkDecorator:
    """Skips a test on a machine that lacks this file of the published GPT-2."""
    reason = f"this machine lacks {name} of the published GPT-2"
    return pytest.mark.skipif(not (GPT2 / name).exists(), reason=reason)


def quietly(build, *args):
    """Call `build` without the deprecation warnings of other people's packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args)


def assert_drawn_from(drawn: Tensor, probabilities: Tensor) -> None:
    """A chi-squared test, that draws as unlikely as one in a thousand fail.

    The seed being fixed, a test passes always or never.
    """
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * len(drawn)
    assert expected.min() >= 5, "too few draws for a chi-squared test"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0).double()
    assert len(expected) == 1 or torch.special.gammaincc(freedom / 2, statistic / 2) > 0.001
