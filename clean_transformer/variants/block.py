"""A block whose attention and MLP read the same input."""

from jaxtyping import Float
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.block import TransformerBlock


class ParallelBlock(TransformerBlock):
    """x + attn(ln1(x)) + mlp(ln2(x)): the MLP's input does not contain the attention output.

    Source: Wang and Komatsuzaki 2021. Black et al. 2022, section 2.1, use a separate LayerNorm for
    the attention and for the MLP, as this block does. The block has no `hook_resid_mid`.
    `hook_mlp_in` gets the residual stream before the block.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        del self.hook_resid_mid

    def forward(
        self, resid_pre: Float[Tensor, "batch pos d_model"], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block; `resid_pre` is the stream before it."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(*self.attn_inputs(resid_pre), kv_cache=kv_cache))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid_pre))))
        return self.hook_resid_post(resid_pre + attn_out + mlp_out)
