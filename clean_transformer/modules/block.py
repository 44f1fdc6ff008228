"""One transformer block: attention and MLP, each added to the residual stream."""

from einops import repeat
from jaxtyping import Float
from torch import Tensor

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule, HookPoint, observed
from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.attention import Attention, Residual
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.modules.mlp import MLP


class TransformerBlock(HookedModule):
    """y + mlp(ln2(y)), where y = x + attn(ln1(x)).

    There is a LayerNorm before the attention, and another before the MLP (pre-norm; Radford et al.
    2019, section 2.3).
    """

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.ln1 = NORMALIZATIONS[cfg.normalization_type](cfg)
        self.attn = Attention(cfg)
        self.ln2 = NORMALIZATIONS[cfg.normalization_type](cfg)
        self.mlp = MLP(cfg)

        self.hook_resid_pre = HookPoint()
        self.hook_attn_in = HookPoint(is_shared=True)
        self.hook_q_input = HookPoint(is_shared=True)
        self.hook_k_input = HookPoint(is_shared=True)
        self.hook_v_input = HookPoint(is_shared=True)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_in = HookPoint(is_shared=True)
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid_pre: Float[Tensor, "batch pos d_model"], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block.

        With `kv_cache`, `resid_pre` belongs to the positions that follow the cached positions.
        """
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(*self.attn_inputs(resid_pre), kv_cache=kv_cache))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid_mid))))
        return self.hook_resid_post(resid_mid + mlp_out)

    def attn_inputs(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> tuple[Residual, ...]:
        """Return the inputs of `self.attn`: usually one tensor, the normalized residual stream.

        If a hook point in `PER_HEAD_INPUTS`, such as `hook_q_input`, has a hook, and
        `self.attn` accepts a separate input for each head, the result is three tensors
        [batch pos head d_model]: the inputs for queries, for keys and for values.
        """
        split = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not (observed(self.hook_attn_in, *split) and self.attn.takes_per_head_inputs):
            return (self.ln1(resid_pre),)
        attn_in = self.hook_attn_in(
            repeat(resid_pre, "batch pos d_model -> batch pos head d_model", head=self.cfg.n_heads)
        )
        return tuple(self.ln1(hook(attn_in)) for hook in split)
