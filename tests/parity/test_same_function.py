"""Question 1 on real shapes: every activation of the installed reference, in float64."""

import pytest
from safetensors.torch import load_file
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.inputs import suite_tokens
from clean_transformer.parity.references.choose import REFERENCES, choose_reference
from clean_transformer.parity.same_function import compare
from clean_transformer.parity.verdict import Verdict
from clean_transformer.weights.formats.huggingface import HUGGINGFACE
from clean_transformer.weights.processing import fold_ln, process_weights, untie
from clean_transformer.weights.synthetic import stress

from ..helpers import GPT2, needs_gpt2

REFERENCE = choose_reference("auto")[0]
only_hooked = pytest.mark.skipif(
    REFERENCE != "hooked", reason="needs the HookedTransformer of transformer_lens 3.9.0"
)
REAL_TENSORS = "gpt2_small_partial.safetensors"


def assert_same_function(cfg: Config, state: dict[str, Tensor], batch: int, length: int) -> None:
    exact = {name: value.double() for name, value in state.items()}
    reference = REFERENCES[REFERENCE](cfg, exact)
    model = DemoTransformer.from_state_dict(exact, cfg)
    report = compare(model, reference, suite_tokens(cfg, batch, length))
    compared, cached = report.coverage
    assert compared == cached
    assert report.verdict is Verdict.PASS, report.first_failure


@pytest.fixture(scope="module")
def small() -> tuple[Config, dict[str, Tensor]]:
    cfg = Config.gpt2("small")
    return cfg, stress(cfg)


@pytest.mark.slow
def test_gpt2_small(small: tuple[Config, dict[str, Tensor]]):
    assert_same_function(*small, batch=3, length=17)


@only_hooked
def test_hooked_transformer_caches_the_optional_activations(
    small: tuple[Config, dict[str, Tensor]],
):
    cfg, state = small
    optional = ("attn_in", "q_input", "k_input", "v_input", "mlp_in", "attn.hook_result")
    cached = REFERENCES["hooked"](cfg, state).run(suite_tokens(cfg, 1, 4))
    for name in optional:
        point = name if "." in name else f"hook_{name}"
        assert f"blocks.11.{point}" in cached


@only_hooked
@pytest.mark.slow
@pytest.mark.parametrize("process", [untie, fold_ln, process_weights])
def test_processed_weights(process, small: tuple[Config, dict[str, Tensor]]):
    assert_same_function(*process(*small), batch=2, length=9)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["medium", "xl"])
def test_two_layers_of_a_larger_size(size: str):
    cfg = Config.gpt2(size, n_layers=2)
    assert_same_function(cfg, stress(cfg), batch=2, length=9)


@pytest.mark.slow
def test_all_1024_positions():
    cfg = Config.gpt2("small", n_layers=2, d_vocab=2048)
    assert_same_function(cfg, stress(cfg), batch=1, length=1024)


@pytest.mark.slow
@needs_gpt2(REAL_TENSORS)
def test_the_published_tensors(small: tuple[Config, dict[str, Tensor]]):
    cfg, state = small
    real = {
        f"transformer.{name}": tensor for name, tensor in load_file(GPT2 / REAL_TENSORS).items()
    }
    published = HUGGINGFACE.write(cfg, state) | real
    assert_same_function(cfg, HUGGINGFACE.read(cfg, published), batch=2, length=17)


@pytest.mark.parametrize("tied", [True, False])
def test_one_layer_of_the_smallest_size(tied: bool):
    cfg = Config.gpt2("small", n_layers=1, d_vocab=2048, tied_unembed=tied)
    assert_same_function(cfg, stress(cfg), batch=2, length=5)
