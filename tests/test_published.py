"""What the published GPT-2 small is known to say, wherever its weights can be had.

The outputs are those that TransformerLens printed in public notebooks.
"""

import pytest
import torch

from clean_transformer.analysis.prediction import predict
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.hub import HubError
from clean_transformer.weights.processing import fold_ln

pytestmark = pytest.mark.real_weights

STYLE = "I am an autoregressive, decoder-only, GPT-2 style transformer."
AMAZING = (
    "I am an amazing autoregressive, decoder-only, GPT-2 style transformer. One day I will exceed "
    "human level intelligence and take over the world!"
)
STORY = "This is a story about Quomatarus. When one day Quomatarus decided"


@pytest.fixture(scope="module")
def gpt2() -> DemoTransformer:
    try:
        model = DemoTransformer.from_pretrained("gpt2", device="cpu")
        assert model.tokenizer.d_vocab == model.cfg.d_vocab
    except HubError as error:
        pytest.skip(f"the published weights are out of reach: {error}")
    return model


def test_the_number_of_parameters_after_folding(gpt2):
    _, folded = fold_ln(gpt2.cfg, gpt2.state_dict())
    assert sum(parameter.numel() for parameter in folded.values()) == 163_049_041


@torch.no_grad()
def test_the_likeliest_token_after_each_prefix(gpt2):
    tokens = gpt2(gpt2.to_tokens(STYLE)).argmax(dim=-1)
    # fmt: off
    assert gpt2.to_str_tokens(tokens) == [
        "\n", "'m", " a", " avid", "od", "sp", ",", " and", "ently", "-", "driven", ",", " and",
        "IM", "-", "only", ".", ",", ".", " I",
    ]
    # fmt: on


def test_greedy_ids(gpt2):
    tokens = gpt2.to_tokens(STYLE)
    assert gpt2.generate(tokens, 2)[0, -2:].tolist() == [314, 423]


def test_greedy_text(gpt2):
    continuation = " I am a very talented and talented person, and"
    n = gpt2.to_tokens(continuation, prepend_bos=False).shape[1]
    assert gpt2.generate(AMAZING, n) == AMAZING + continuation
    assert "".join(gpt2.stream(AMAZING, n)) == continuation


def test_the_five_likeliest_tokens(gpt2):
    top = predict(gpt2, "Hullo, my name is", top=5).top
    assert [score.id for score in top] == [1757, 367, 2940, 3619, 3899]
    tokens = [" John", " H", " Mark", " Jack", " Michael"]
    assert [gpt2.to_string([score.id]) for score in top] == tokens
    assert [round(score.probability, 4) for score in top] == [0.023, 0.0181, 0.0119, 0.0113, 0.0113]


def test_the_probability_of_each_token_of_a_text(gpt2):
    # fmt: off
    assert [round(p, 3) for p in predict(gpt2, STORY).token_probabilities.tolist()] == [
        0.008, 0.184, 0.333, 0.013, 0.498, 0.0, 0.0, 0.0, 0.0, 0.141, 0.004, 0.009, 0.015, 0.026,
        0.914, 0.98, 0.996, 0.009,
    ]
    # fmt: on


def test_the_shape_of_a_pattern(gpt2):
    _, cache = gpt2.run_with_cache(gpt2.to_tokens(STORY), remove_batch_dim=True)
    assert cache["pattern", 0, "attn"].shape == (12, 19, 19)
