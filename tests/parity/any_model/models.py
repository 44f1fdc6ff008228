"""Models of several libraries, a model in a file of its own, and faults to plant in their runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.corruptions import attending, with_result
from clean_transformer.parity.references.choose import IMPLEMENTATIONS

from ...helpers import quietly
from ..small import broken, small_weights

# A GPT as people write it for themselves: nn.Linear, nn.GELU, fused attention, tied weights.
SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F
from types import SimpleNamespace


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        b, t, c = x.shape
        parts = self.qkv(self.ln_1(x)).split(c, 2)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1] / temperature
            drawn = torch.multinomial(F.softmax(logits, -1), num_samples=1)
            idx = torch.cat((idx, drawn), 1)
        return idx


def make_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=64)
    return GPT(SimpleNamespace(**sizes))
"""

SIZES = {"n_layers": 1, "d_vocab": 300, "n_ctx": 32}
LIBRARIES = {each.name: each for each in IMPLEMENTATIONS}
# The fast tests run only the kind "file".
KINDS = (
    "file",
    pytest.param("ours", marks=pytest.mark.slow),
    *(
        pytest.param(kind, marks=[pytest.mark.reference, pytest.mark.slow])
        for kind in ("huggingface", "bridge", "hooked")
    ),
)


def is_installed(kind: str) -> bool:
    return kind not in LIBRARIES or LIBRARIES[kind].is_installed()


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small model of that library, or of SCRIPT for the kind "file"."""
    if kind == "file":
        names: dict = {"__name__": "script"}
        exec(compile(SCRIPT, "script.py", "exec"), names)
        return names["make_model"]().to(dtype)
    weights = small_weights("plain", **SIZES)
    state = {name: value.to(dtype) for name, value in weights.state.items()}
    if kind == "ours":
        return DemoTransformer.from_state_dict(state, weights.cfg)
    return quietly(LIBRARIES[kind].model, weights.cfg, state, torch.device("cpu"))


def some_tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def together(*faults) -> Iterator[None]:
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault)
        yield


def _unmasked(func, args, options) -> Tensor:
    return func(torch.ones_like(args[0]), *args[1:], **options)


# Each fault names all operations that compute the same thing in the different libraries.
FAULTS = {
    "weight": lambda: inject("linear-noncontiguous-weight"),
    "mask": lambda: together(
        broken(
            "_scaled_dot_product_flash_attention_for_cpu",
            attending(lambda query, key, n_keys: key > query + 1),
        ),
        broken("where", _unmasked),
    ),
    "gelu": lambda: together(
        broken("gelu_backward", with_result(lambda gradient: gradient * 1.01)),
        broken("tanh_backward", with_result(lambda gradient: gradient * 1.01)),
    ),
}
