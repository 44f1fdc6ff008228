"""Every contestant that is installed here computes GPT-2, in all work that it can do."""

from pathlib import Path

import pytest
import torch

from clean_transformer.benchmark.contestants import CONTESTANTS
from clean_transformer.benchmark.contestants.base import Contestant
from clean_transformer.benchmark.contestants.ours import Ours
from clean_transformer.benchmark.running.worker import has, some_tokens
from clean_transformer.config import Config
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.synthetic import plain

CFG = Config(n_layers=2, n_heads=2, d_model=32, d_head=16, d_mlp=128, d_vocab=1000, n_ctx=64)
PACKAGES = {
    "CTranslate2": "ctranslate2",
    "llama.cpp": "llama_cpp",
    "TransformerBridge": "transformer_lens.model_bridge",
    "nnsight": "nnsight",
}
# Compiling and exporting take a minute, and HookedTransformer needs another environment. Every run
# of the benchmark compares the logits and first tokens of all contestants with ours.
COMPILED = (
    "compiled",
    "optimized compiled",
    "transformers compiled",
    "transformers static",
    "onnxruntime",
)
LEFT_OUT = (*COMPILED, "HookedTransformer", "limit")
TESTED = [name for name in CONTESTANTS if name not in LEFT_OUT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder, CFG, plain(CFG))
    return folder


@pytest.fixture(scope="module", params=TESTED)
def contestant(request: pytest.FixtureRequest, folder: Path) -> Contestant:
    name = request.param
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return CONTESTANTS[name](folder, "cpu", "float32")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Ours:
    return Ours(folder, "cpu", "float32")


@pytest.mark.filterwarnings("ignore")  # other libraries warn
@torch.inference_mode()
def test_the_same_logits_and_tokens(contestant: Contestant, ours: Ours):
    tokens = some_tokens(2, 12, "cpu")
    logits = contestant.last_logits(tokens)
    torch.testing.assert_close(logits, ours.last_logits(tokens), rtol=1e-3, atol=1e-3)
    if has(contestant, "generate"):
        generated = torch.as_tensor(contestant.generate(tokens, 5))
        assert generated.tolist() == ours.generate(tokens, 5).tolist()


@pytest.mark.parametrize("name", ["ours", "transformers sdpa"])
@torch.inference_mode()
def test_the_last_logits_only(name: str, folder: Path):
    contestant, tokens = CONTESTANTS[name](folder, "cpu", "float32"), some_tokens(2, 6, "cpu")
    last = contestant.forward(tokens, last_only=True)
    torch.testing.assert_close(last[:, 0], contestant.forward(tokens)[:, -1])


@pytest.mark.parametrize("name", ["ours", "transformers sdpa", "nanoGPT-style"])
def test_training_learns(name: str, folder: Path):
    contestant, tokens = CONTESTANTS[name](folder, "cpu", "float32"), some_tokens(2, 9, "cpu")
    losses = [contestant.train_step(tokens) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


@pytest.mark.filterwarnings("ignore")  # other libraries warn
def test_all_train_the_same_numbers_by_the_same_gradient(folder: Path):
    tokens, sizes, losses, norms = some_tokens(2, 9, "cpu"), [], [], []
    for name in ("ours", "transformers sdpa", "nanoGPT-style"):
        contestant = CONTESTANTS[name](folder, "cpu", "float32")
        [group] = contestant.optimizer.param_groups
        sizes.append(sum(parameter.numel() for parameter in group["params"]))
        losses.append(contestant.train_step(tokens))
        torch.autograd.backward(
            contestant.loss(
                contestant.forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
            )
        )
        gradients = [parameter.grad for parameter in group["params"]]
        norms.append(sum(float(each.square().sum()) for each in gradients) ** 0.5)
    assert len(set(sizes)) == 1
    # Before a step and after it, so also of the same step.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # other libraries warn
@torch.inference_mode()
def test_nnsight_keeps_what_we_keep(folder: Path, ours: Ours):
    pytest.importorskip("nnsight")
    tokens = some_tokens(2, 6, "cpu")
    logits, theirs = CONTESTANTS["nnsight"](folder, "cpu", "float32").capture(tokens)
    expected, cache = ours.capture(tokens)
    torch.testing.assert_close(logits.logits, expected, rtol=1e-3, atol=1e-3)
    _, pattern = theirs["model.transformer.h.0.attn"].output
    torch.testing.assert_close(pattern, cache["pattern", 0])
    torch.testing.assert_close(theirs["model.transformer.h.1.mlp"].output, cache["mlp_out", 1])


@torch.inference_mode()
def test_watched_attention_is_explicit(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise the cost of capturing would include the cost of another kernel."""
    monkeypatch.setattr("clean_transformer.modules.attention.mix_fused", None)
    CONTESTANTS["watched"](folder, "cpu", "float32").forward(some_tokens(1, 4, "cpu"))
    with pytest.raises(TypeError):
        CONTESTANTS["ours"](folder, "cpu", "float32").forward(some_tokens(1, 4, "cpu"))
