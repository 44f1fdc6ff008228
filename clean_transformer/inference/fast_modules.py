"""TODO inference/fast_modules."""

import warnings
from collections.abc import Callable
from operator import is_
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.hooks import HookPoint
from clean_transformer.inference.autotune import Choice, fastest_for_blocks, fastest_for_unembed
from clean_transformer.inference.matmuls import Int8, Product
from clean_transformer.inference.weight_layout import lay_out, merge_heads
from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.attention import Attention, mix_fused
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.layer_norm import LayerNorm, LayerNormPre
from clean_transformer.modules.mlp import MLP
from clean_transformer.modules.unembed import TiedUnembed, Unembed

# The modules that the fast steps were written from; of another class, a block stays as it is.
WRITTEN_FOR = (Attention, MLP, LayerNorm, LayerNormPre, HookPoint)


# What makes a graph run no Python between its kernels, by type of device.
WITHOUT_PYTHON: dict[str, dict[str, Any]] = {
    "cpu": {"cpp_wrapper": True},
    "cuda": {"triton.cudagraphs": True},
}


class NotOptimized(UserWarning):
    """An optimized module runs as it is written; the message says why."""


class Fast:
    """What stands in for a method of a module, for as long as that is as it was prepared.

    With `weights` "int8" it reads copies of the parameters, which it then has to hear of changing.
    """

    def __init__(self, module: nn.Module, weights: str | None, *also_read: nn.Module):
        self.module, self.reads_copies = module, weights == "int8"
        inside = [*module.modules()]
        self.hooks = [
            hooks
            for part in inside[1:]
            for hooks in (
                part._forward_hooks,
                part._forward_pre_hooks,
                part._backward_hooks,
                part._backward_pre_hooks,
            )
        ]
        owned = [
            (part._modules, name, child) for part in inside for name, child in part.named_children()
        ] + [
            (part._parameters, name, parameter)
            for part in (*inside, *also_read)
            for name, parameter in part.named_parameters(recurse=False)
        ]
        self.owners, self.names, self.owned = zip(*owned, strict=True)
        self.parameters = [each for each in self.owned if isinstance(each, nn.Parameter)]
        self.state = self.state_of_parameters()

    def state_of_parameters(self) -> list[int]:
        """Where each is in memory and, if a copy of it is read, how often it was changed there."""
        places = [parameter.data_ptr() for parameter in self.parameters]
        if self.reads_copies:
            places += [parameter._version for parameter in self.parameters]
        return places

    def is_watched(self) -> bool:
        """Whether there are hooks inside; a graph has what holds when it is made."""
        return any(self.hooks)

    # What torch.compiler.assume_constant_result does, after an import that takes seconds.
    is_watched._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def steps_aside(self) -> bool:
        """Whether the module has to run as it is written; it warns why."""
        if torch.compiler.is_compiling():
            return torch.is_grad_enabled() or self.is_watched()
        if torch.is_grad_enabled():
            reason = "gradients are on; use it under torch.no_grad()"
        elif self.is_watched():
            reason = "something inside it is watched or patched"
        elif torch.is_autocast_enabled(self.parameters[0].device.type):
            reason = "autocast is on"
        # For every token; `map` takes a tenth of the time of a loop.
        elif not (
            all(map(is_, map(dict.get, self.owners, self.names), self.owned))
            and self.state == self.state_of_parameters()
        ):
            reason = "its modules or weights have changed; call optimize() again"
        else:
            return False
        warnings.warn(
            f"an optimized {type(self.module).__name__} runs as it is written: {reason}",
            NotOptimized,
            stacklevel=3,
        )
        return True


class FastBlock(Fast):
    """`TransformerBlock.forward`, in the four products that it needs."""

    module: TransformerBlock

    def __init__(self, block: TransformerBlock, weights: str | None):
        cfg, attn, mlp = block.cfg, block.attn, block.mlp
        choice = choose(attn.W_Q, weights, fastest_for_blocks, cfg.d_model, cfg.d_mlp, cfg.n_layers)
        W_QKV, b_QKV = merge_heads(attn, choice.transposed)
        for parameter in (mlp.W_in, mlp.W_out, attn.W_O):
            lay_out(parameter, choice.transposed)
        self.choice = choice
        prepare = choice(1).prepare
        self.qkv = prepare(W_QKV, b_QKV)
        self.out = prepare(attn.W_O.data.flatten(end_dim=1), attn.b_O.data)
        self.mlp_in = prepare(mlp.W_in.data, mlp.b_in.data)
        self.mlp_out = prepare(mlp.W_out.data, mlp.b_out.data)
        super().__init__(block, weights)

    def __call__(
        self, resid_pre: Float[Tensor, "batch pos d_model"], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """As `TransformerBlock.forward`."""
        block = self.module
        if self.steps_aside():
            return TransformerBlock.forward(block, resid_pre, kv_cache)
        batch, pos, d_model = resid_pre.shape
        residual = resid_pre.reshape(batch * pos, d_model)
        product = self.choice(batch * pos)

        qkv = product(block.ln1.forward(residual), self.qkv)
        q, k, v = qkv.view(batch, pos, 3, block.cfg.n_heads, block.cfg.d_head).unbind(dim=2)
        mask = None
        if kv_cache is not None:
            mask = kv_cache.mask(pos)
            k, v = kv_cache.append(k, v)
        z = mix_fused(q, k, v, mask).reshape(batch * pos, -1)
        resid_mid = product.add(residual, z, self.out)

        post = product.gelu(block.ln2.forward(resid_mid), self.mlp_in)
        return product.add(resid_mid, post, self.mlp_out).view(batch, pos, d_model)


class FastUnembed(Fast):
    """`Unembed.forward` by the fastest product."""

    module: Unembed | TiedUnembed

    def __init__(self, unembed: Unembed | TiedUnembed, weights: str | None):
        cfg, W_U = unembed.cfg, unembed.W_U.detach()
        self.choice = choose(W_U, weights, fastest_for_unembed, cfg.d_model, cfg.d_vocab)
        self.weight = self.choice(1).prepare(W_U, unembed.b_U.data)
        super().__init__(unembed, weights, *getattr(unembed, "_embed", ()))

    def __call__(
        self, normalized_resid_post: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """As `Unembed.forward`."""
        if self.steps_aside():
            # One function serves both classes.
            return Unembed.forward(self.module, normalized_resid_post)  # type: ignore[arg-type]
        rows = normalized_resid_post.flatten(end_dim=1)
        logits = self.choice(len(rows))(rows, self.weight)
        return logits.view(*normalized_resid_post.shape[:2], -1)


class CompiledStep(Fast):
    """`DemoTransformer.read` of one more token, as one graph of all that is fast in it."""

    def __init__(self, model: nn.Module, weights: str | None):
        super().__init__(model, weights)
        self.written = cast(Any, model.read)
        options = WITHOUT_PYTHON.get(self.parameters[0].device.type)
        self.graph = torch.compile(self.written, dynamic=False, options=options)

    def __call__(self, *inputs: Any) -> Float[Tensor, "batch logit_pos d_vocab"]:
        """As `DemoTransformer.read`."""
        return (self.written if self.steps_aside() else self.graph)(*inputs)


FAST = {TransformerBlock: FastBlock, Unembed: FastUnembed, TiedUnembed: FastUnembed}


def choose(W: Tensor, weights: str | None, fastest: Callable[..., Choice], *sizes: int) -> Choice:
    """The products for such weights, where they are."""
    if weights == "int8":
        return Choice({1: Int8()}, transposed=False)
    if W.device.type != "cpu":
        return Choice({1: Product()}, transposed=False)
    return fastest(*sizes, W.dtype, torch.get_num_threads())
