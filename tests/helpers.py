"""Small random models, the activations of a reference, and assertions that several tests use."""

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

# All axes have different lengths, so that a transposed or misplaced tensor raises an error.
TINY = Config(n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=20, d_vocab=31, n_ctx=10)


def tiny(**changes) -> Config:
    return replace(TINY, **changes)


def configs(**fixed) -> st.SearchStrategy[Config]:
    """Draw architectures that every format can store. `fixed` gives fields that are not drawn."""

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
    """A model whose parameters are all random, so that tests notice a gain or bias left out.

    Only if `b_U` is true, `unembed.b_U` is random too. Hugging Face's format cannot store it.
    """
    generator = torch.Generator().manual_seed(seed)
    model = DemoTransformer(cfg).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if b_U or name != "unembed.b_U":
                parameter.normal_(std=0.3, generator=generator)
    return model


def random_state(known: Format, cfg: Config) -> dict[str, Tensor]:
    """Random parameters; those that the format cannot store are zero."""
    state = random_model(cfg, b_U=True).state_dict()
    return {
        row.ours: state[row.ours] if row.theirs else torch.zeros_like(state[row.ours])
        for row in known.rows(cfg)
    }


def trained(**special: str) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's, with 270 tokens. `end` names its end token."""
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
    """A small random model in float32 with a tokenizer, so that it takes texts."""
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
    """Make every parameter of the module random, and return the module in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.to(dtype)


def assert_same_function(ours: Tensor, theirs: Tensor) -> None:
    """Assert that two float64 tensors differ by at most 1e-12 of their scale, the root mean square.

    Rounding causes differences of about 1e-15, and a different formula at least 1e-8. The tolerance
    is 4,504 times float64's machine epsilon. In another dtype, it is 4,504 times that dtype's.
    """
    assert ours.shape == theirs.shape
    tolerance = 1e-12 / torch.finfo(torch.float64).eps * torch.finfo(ours.dtype).eps
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    scale = theirs.square().mean().sqrt()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(tolerance * scale))


def assert_equal_states(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Assert that two state dicts have the same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_gradients(module: nn.Module, *inputs: Tensor) -> None:
    """Assert that gradients agree with finite differences, for all parameters and float inputs."""
    names = [name for name, _ in module.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)

    def run(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=False))
        return functional_call(module, parameters, values[len(names) :])

    assert torch.autograd.gradcheck(run, (*values, *inputs))


class Rounding:
    """The largest difference that rounding can cause between two runs of AdamW, for each element.

    The betas are 0.9 and 0.95. If the gradients g of the two runs differ by at most δ, then their
    means m̂ differ by at most δ. Their root mean squares √v̂ do too, because √v̂ is a norm. So the
    steps m̂ / (√v̂ + ε) differ by at most δ (1 + C) / (√v̂ + ε). Here |m̂| ≤ C √v̂ by Cauchy and
    Schwarz, and C is at most 1.02 in ten steps. To first order, the differences of all steps add
    up. Rounding in float64 gives δ ≤ 1e-12 of the largest gradient.
    """

    def __init__(self) -> None:
        self.allowed: dict[str, Tensor] = {}

    def add(
        self, step: int, rate: float, gradient: float, exp_avg_sq: Mapping[str, Tensor]
    ) -> None:
        """Add the step with index `step` (from 0). No gradient may be larger than `gradient`."""
        for name, squares in exp_avg_sq.items():
            root = (squares / (1 - 0.95 ** (step + 1))).sqrt()
            moved = rate * 2.02 * 1e-12 * gradient / (root + 1e-8)
            self.allowed[name] = self.allowed.get(name, 0) + moved


def watch_everything(module: nn.Module) -> None:
    """Put a hook on every hook point, so that the module computes every activation explicitly."""
    for point in module.hook_dict.values():
        point.register_forward_hook(lambda *_: None)


@dataclass(frozen=True)
class Watched:
    """A run of a reference with 12 layers: config, weights, tokens, and cache under our names."""

    cfg: Config
    state: Mapping[str, Tensor]
    tokens: Tensor
    cache: Mapping[str, Tensor]

    def normalized(self, layer_norm: str) -> Tensor:
        """The output of a LayerNorm.

        `HookedTransformer` caches it only before gain and bias, and for ln1 one copy per head.
        """
        if layer_norm in self.cache:
            return self.cache[layer_norm]
        normalized = self.cache[f"{layer_norm}.hook_normalized"]
        if normalized.ndim == 4:
            normalized = normalized[:, :, 0]
        return normalized * self.state[f"{layer_norm}.w"] + self.state[f"{layer_norm}.b"]

    def with_weights(self, module: nn.Module, path: str) -> nn.Module:
        """Load the reference's weights at `path` into the module, which is returned in float64."""
        prefix = f"{path}." if path else ""
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix)
        }
        module.double().load_state_dict(weights)
        return module


def reference_model(reference: Reference) -> nn.Module:
    """The model of a `Reference`. Only the closure of the method `run` refers to it."""
    variables = getclosurevars(unwrap(reference.run)).nonlocals
    return variables["bridge"] if "bridge" in variables else variables["model"]


def needs(kind: str, installed: str) -> None:
    """Skip the test if it needs another version of TransformerLens than the installed one."""
    if kind not in (installed, "huggingface"):
        pytest.skip(f"the reference {kind!r} needs another transformer_lens than {installed!r}")


@contextmanager
def unchecked_types() -> Iterator[None]:
    """Turn off the type checks of signatures, as for users, so that our own errors show."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


def needs_gpt2(name: str) -> pytest.MarkDecorator:
    """Skip a test on machines that lack the file `name` of the published GPT-2."""
    reason = f"this machine lacks {name} of the published GPT-2"
    return pytest.mark.skipif(not (GPT2 / name).exists(), reason=reason)


def needs_torch(version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test on a PyTorch before `version`; `why` says what it lacks."""
    reason = f"{why} before PyTorch {version}, and this is {torch.__version__}"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


def quietly(build, *args, **options):
    """Call `build(*args, **options)` and ignore all warnings, which come from other packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args, **options)


def assert_drawn_from(drawn: Tensor, probabilities: Tensor) -> None:
    """Assert by a chi-squared test that `drawn` follows `probabilities`.

    The test fails if draws from these probabilities would look this unusual less often than once in
    a thousand times. The seed is fixed, so that a test either always passes or never.
    """
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * len(drawn)
    assert expected.min() >= 5, "too few draws for a chi-squared test"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0).double()
    assert len(expected) == 1 or torch.special.gammaincc(freedom / 2, statistic / 2) > 0.001
