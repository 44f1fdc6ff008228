import pytest
import torch

from clean_transformer.support.numerics import at_least_float32, upcast


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_becomes_float32_and_the_rest_stays(given, expected):
    x = torch.tensor([0.1, 300.0]).to(given)
    assert at_least_float32(x).dtype == expected
    assert torch.equal(at_least_float32(x).to(given), x)
    assert (at_least_float32(x) is x) == (given == expected)


def test_numbers_become_float64_and_token_ids_stay_integers():
    assert upcast(torch.tensor([0.5])).dtype == torch.float64
    assert upcast(torch.tensor([3])).dtype == torch.int64
