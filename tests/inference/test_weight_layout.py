import pytest
import torch

from clean_transformer import DemoTransformer
from clean_transformer.inference.weight_layout import merge_heads

from ..helpers import random_model


def test_a_loaded_checkpoint_is_merged_without_a_copy(tmp_path):
    random_model(dtype=torch.float32).save_pretrained(tmp_path)
    loaded = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    attn = loaded.blocks[0].attn

    merged, _ = merge_heads(attn, transposed=False)

    assert merged.data_ptr() == attn.W_Q.data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_merged_heads_are_all_three_side_by_side(transposed: bool):
    attn = random_model().blocks[0].attn
    wanted = torch.cat([W.movedim(1, 0).flatten(1) for W in (attn.W_Q, attn.W_K, attn.W_V)], dim=1)
    biases = torch.cat([attn.b_Q, attn.b_K, attn.b_V]).flatten()

    merged, b = merge_heads(attn, transposed)

    assert torch.equal(merged, wanted)
    assert torch.equal(b, biases)
    assert merged.T.is_contiguous() if transposed else merged.is_contiguous()
    again, b = merge_heads(attn, transposed)
    assert again.data_ptr() == merged.data_ptr()
    assert again.stride() == merged.stride()
    attn.W_V += 1
    attn.b_K += 1
    assert not torch.equal(merged, wanted)
    assert not torch.equal(b, biases)
