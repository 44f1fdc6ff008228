import torch
import torch.nn.functional as F

from clean_transformer.weights.formats.transformer_lens import TRANSFORMER_BRIDGE

from ...helpers import assert_same_function, random_model, random_tensor, tiny

# Square matrices, which would fit transposed as well.
SQUARE = tiny(n_heads=3, d_head=4, d_model=12, d_mlp=12, d_vocab=12, n_ctx=12, tied_unembed=False)


def test_square_matrices_do_what_ours_do():
    model, x = random_model(SQUARE, b_U=True), random_tensor(2, 5, SQUARE.d_model)
    theirs = TRANSFORMER_BRIDGE.write(SQUARE, model.state_dict())
    block, _, cache = "blocks.1", *model.blocks[1].attn.run_with_cache(x)

    for letter in "qkv":  # nn.Linear's layout
        weight, bias = (
            theirs[f"{block}.attn.{letter}.weight"],
            theirs[f"{block}.attn.{letter}.bias"],
        )
        assert_same_function(F.linear(x, weight, bias), cache[letter].flatten(2))
    # Conv1D's layout
    out = cache["z"].flatten(2) @ theirs[f"{block}.attn.o.weight"] + theirs[f"{block}.attn.o.bias"]
    assert_same_function(out, model.blocks[1].attn(x))
    pre = x @ theirs[f"{block}.mlp.in.weight"] + theirs[f"{block}.mlp.in.bias"]
    post = F.gelu(pre, approximate="tanh")
    mlp_out = post @ theirs[f"{block}.mlp.out.weight"] + theirs[f"{block}.mlp.out.bias"]
    assert_same_function(mlp_out, model.blocks[1].mlp(x))
    logits = F.linear(x, theirs["unembed.weight"], theirs["unembed.bias"])
    assert_same_function(logits, model.unembed(x))
    assert torch.equal(theirs["embed.weight"], model.embed.W_E)
    assert torch.equal(theirs["pos_embed.weight"], model.pos_embed.W_pos)
