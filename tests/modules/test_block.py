import pytest
import torch
from einops import repeat

from clean_transformer.modules.block import TransformerBlock
from clean_transformer.support.selection import PER_HEAD

from ..helpers import (
    TINY,
    assert_gradients,
    assert_same_function,
    random_tensor,
    randomized,
    tiny,
    watch_everything,
)


@pytest.mark.parametrize("layer", range(12))
def test_equals_transformer_lens(theirs, device, dtype, layer: int):
    place = f"blocks.{layer}"
    block = theirs.with_weights(TransformerBlock(theirs.cfg), place).to(device, dtype)
    resid_pre = theirs.cache[f"{place}.hook_resid_pre"].to(device, dtype)
    output, cache = block.run_with_cache(resid_pre)
    assert_same_function(block(resid_pre), theirs.cache[f"{place}.hook_resid_post"])
    assert_same_function(output, theirs.cache[f"{place}.hook_resid_post"])
    for point in ("attn_out", "resid_mid", "mlp_out"):
        assert_same_function(cache[point], theirs.cache[f"{place}.hook_{point}"])


def test_is_two_additions_to_the_residual_stream():
    block, x = randomized(TransformerBlock(TINY)), random_tensor(2, 5, TINY.d_model)
    resid_mid = x + block.attn(block.ln1(x))
    assert torch.equal(block(x), resid_mid + block.mlp(block.ln2(resid_mid)))


@pytest.mark.parametrize("normalization_type", ["LN", "LNPre"])
def test_split_inputs_change_nothing_and_are_the_stream_once_per_head(normalization_type: str):
    cfg = tiny(normalization_type=normalization_type, tied_unembed=False)
    block, x = randomized(TransformerBlock(cfg)), random_tensor(2, 5, TINY.d_model)
    split = PER_HEAD[:4]
    output, cache = block.run_with_cache(x, names_filter=split)
    assert_same_function(output, block(x))
    per_head = repeat(x, "batch pos d_model -> batch pos head d_model", head=TINY.n_heads)
    assert [*cache] == [*split]
    assert all(torch.equal(value, per_head) for value in cache.values())


def test_hook_shapes():
    resid = [2, 5, TINY.d_model]
    _, cache = TransformerBlock(TINY).run_with_cache(torch.ones(resid))
    streams = [name for name in cache if "." not in name]
    assert streams == [
        "hook_resid_pre",
        "hook_attn_out",
        "hook_resid_mid",
        "hook_mlp_in",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    assert all([*cache[name].shape] == resid for name in streams)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("watched", [False, True])
def test_half_precision_keeps_its_dtype(half: torch.dtype, watched: bool):
    block = randomized(TransformerBlock(TINY), half)
    if watched:
        watch_everything(block)
    output = block(random_tensor(2, 5, TINY.d_model, dtype=half))
    assert output.dtype == half
    assert output.isfinite().all()


@pytest.mark.parametrize("watched", [False, True])
def test_gradients(watched: bool):
    block = randomized(TransformerBlock(tiny(n_heads=2, d_head=2, d_model=3, d_mlp=4)))
    if watched:
        watch_everything(block)
    assert_gradients(block, random_tensor(1, 3, 3))
