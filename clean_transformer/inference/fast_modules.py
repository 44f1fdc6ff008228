"""Fast methods for blocks, for unembeddings, and for the model's decoding step.

A replacement calls the method that it replaces whenever the two could behave differently: if a
submodule has a hook or a patched method, if gradients are enabled, if autocast is on, or if the
module has changed.
"""

import warnings
from operator import contains, is_
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from clean_transformer.hooks import HookPoint
from clean_transformer.inference.int8 import Int8
from clean_transformer.inference.matmuls import Matmul, kernel_for
from clean_transformer.inference.weight_layout import lay_out, merge_heads
from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.attention import Attention, mix_fused
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.layer_norm import LayerNorm, LayerNormPre
from clean_transformer.modules.mlp import MLP
from clean_transformer.modules.unembed import TiedUnembed, Unembed
from clean_transformer.support.stand_in import Method, reassigned

# `optimize` replaces a module's `forward` only if the class of every submodule is in this tuple. A
# module with a submodule of another class, even of a subclass, is not optimized.
SUPPORTED = (Attention, MLP, LayerNorm, LayerNormPre, HookPoint)

# The methods whose work a replacement does itself, instead of calling them.
METHODS = ("forward", "mix", "attn_inputs")


# Options of torch.compile for each device type. With these options, the compiled graph starts all
# its kernels without running Python code between them.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"cpp_wrapper": True},
    "cuda": {"triton.cudagraphs": True},
}


class NotOptimized(UserWarning):
    """Warns that an optimized module runs its original, slower method. The message says why."""


class Fast:
    """A fast replacement for a method of `module`, such as `forward`.

    The replacement is used until a submodule or a parameter is replaced. With `weights="int8"`, it
    computes with 8-bit copies of the parameters, so it is also no longer used after a parameter has
    changed in place. Changes through `parameter.data` are noticed at the next input of more than
    one position. In `generate`, the unembedding never gets such an input.

    If `weights` is None, it reads the parameters themselves, and computes with the new values after
    such a change. `also_read` are modules outside of `module` whose parameters it reads, too.
    """

    below: Method  # the replaced method, which is called when the replacement cannot be used

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
        # `module.forward` itself is not in the list, because this object is called in its place.
        methods = [(part, name) for part in inside for name in METHODS if hasattr(part, name)]
        self.parts, self.methods = zip(*methods[1:], strict=True)
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
        self.sums = self.sums_of_parameters()

    def over(self, below: Method) -> "Fast":
        """Store `below`, the method that this object replaces, and return this object."""
        self.below = below
        return self

    def state_of_parameters(self) -> list[int]:
        """Return the memory addresses of all parameters, to find out later whether they changed.

        With 8-bit weights, the list also has the parameters' version counters. PyTorch increases a
        parameter's version counter at each change in place.
        """
        state = [parameter.data_ptr() for parameter in self.parameters]
        if self.reads_copies:
            state += [parameter._version for parameter in self.parameters]
        return state

    def sums_of_parameters(self) -> list[float]:
        """Return the sum of each parameter for 8-bit copies, and an empty list otherwise.

        Changes through `parameter.data` do not increase version counters, but they change the sums.
        The rounding of a sum depends on the number of threads, which is therefore also in the list.
        """
        if not self.reads_copies:
            return []
        return [
            float(torch.get_num_threads()),
            *(each.detach().sum().item() for each in self.parameters),
        ]

    def has_hooks(self) -> bool:
        """Whether any submodule has a hook, or a method that other code has replaced.

        PyTorch's global hooks count as hooks of every submodule.
        """
        # This runs for every token. `map(contains, …)` is several times faster than `reassigned`.
        own = map(contains, map(vars, self.parts), self.methods)
        patched = any(own) and any(map(reassigned, self.parts, self.methods))
        everywhere = bool(_global_forward_pre_hooks or _global_forward_hooks)
        return patched or any(self.hooks) or everywhere

    # Because of this attribute, a compiled graph keeps the result of compile time. The decorator
    # torch.compiler.assume_constant_result sets the same attribute. We do not use the decorator,
    # because it imports a part of PyTorch, and this import takes seconds.
    has_hooks._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def must_step_aside(self, n_pos: int = 1) -> bool:
        """Whether to call the replaced method `below` instead of this replacement.

        With more than one position, as in a prompt, 8-bit copies also compare the parameters' sums.
        With one position, this would take longer than the computation.

        If the result is True, the warning `NotOptimized` says why. There is no warning while
        `torch.compile` traces this method.
        """
        if torch.compiler.is_compiling():
            return torch.is_grad_enabled() or self.has_hooks()
        if torch.is_grad_enabled():
            reason = "gradients are on; use it under torch.no_grad()"
        elif self.has_hooks():
            reason = "a submodule has a hook or a patched method"
        elif torch.is_autocast_enabled(self.parameters[0].device.type):
            reason = "autocast is on"
        # Check that all submodules and parameters are still the same objects. This check runs for
        # every token, and `map` takes a tenth of the time of a Python loop.
        elif not (
            all(map(is_, map(dict.get, self.owners, self.names), self.owned))
            and self.state == self.state_of_parameters()
        ):
            reason = "its modules or weights have changed; call optimize() again"
        elif n_pos > 1 and self.sums != self.sums_of_parameters():
            reason = (
                "its weights or PyTorch's number of threads have changed; call optimize() again"
            )
        else:
            return False
        warnings.warn(
            f"an optimized {type(self.module).__name__} runs its own forward: {reason}",
            NotOptimized,
            stacklevel=3,
        )
        return True


class FastBlock(Fast):
    """Computes `TransformerBlock.forward` with four large matrix products and no hook points."""

    module: TransformerBlock

    def __init__(self, block: TransformerBlock, weights: str | None):
        attn, mlp = block.attn, block.mlp
        self.kernel = kernel = choose(attn.W_Q, weights)
        W_QKV, b_QKV = merge_heads(attn, kernel.column_major)
        for parameter in (mlp.W_in, mlp.W_out, attn.W_O):
            lay_out(parameter, kernel.column_major)
        prepare = kernel.prepare
        self.qkv = prepare(W_QKV, b_QKV)
        self.out = prepare(attn.W_O.data.flatten(end_dim=1), attn.b_O.data)
        self.mlp_in = prepare(mlp.W_in.data, mlp.b_in.data)
        self.mlp_out = prepare(mlp.W_out.data, mlp.b_out.data)
        super().__init__(block, weights)

    def __call__(
        self, resid_pre: Float[Tensor, "batch pos d_model"], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after the block."""
        if self.must_step_aside(resid_pre.shape[1]):
            return self.below(resid_pre, kv_cache)
        block = self.module
        batch, pos, d_model = resid_pre.shape
        residual = resid_pre.reshape(batch * pos, d_model)
        matmul = self.kernel

        qkv = matmul(block.ln1.forward(residual), self.qkv)
        q, k, v = qkv.view(batch, pos, 3, block.cfg.n_heads, block.cfg.d_head).unbind(dim=2)
        mask = None
        if kv_cache is not None:
            mask = kv_cache.mask(pos)
            k, v = kv_cache.append(k, v)
        z = mix_fused(q, k, v, mask).reshape(batch * pos, -1)
        resid_mid = matmul.add(residual, z, self.out)

        post = matmul.gelu(block.ln2.forward(resid_mid), self.mlp_in)
        return matmul.add(resid_mid, post, self.mlp_out).view(batch, pos, d_model)


class FastUnembed(Fast):
    """Computes `Unembed.forward` with the kernel of `kernel_for`."""

    module: Unembed | TiedUnembed

    def __init__(self, unembed: Unembed | TiedUnembed, weights: str | None):
        W_U = unembed.W_U.detach()
        self.kernel = choose(W_U, weights)
        self.weight = self.kernel.prepare(W_U, unembed.b_U.data)
        super().__init__(unembed, weights, *getattr(unembed, "_embed", ()))

    def __call__(
        self, normalized_resid_post: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits."""
        if self.must_step_aside(normalized_resid_post.shape[1]):
            return self.below(normalized_resid_post)
        rows = normalized_resid_post.flatten(end_dim=1)
        logits = self.kernel(rows, self.weight)
        return logits.view(*normalized_resid_post.shape[:2], -1)


class CompiledStep(Fast):
    """Runs `DemoTransformer.read_one`, the forward pass for one new token, as a compiled graph."""

    def over(self, below: Method) -> Fast:
        """Store `below`, the replaced method, and `torch.compile(below)`. Return this object."""
        options = COMPILE_OPTIONS.get(self.parameters[0].device.type)
        self.graph = torch.compile(below, dynamic=False, options=options)
        return super().over(below)

    def __call__(self, *inputs: Any) -> Float[Tensor, "batch logit_pos d_vocab"]:
        """Return the logits of the new token."""
        return (self.below if self.must_step_aside() else self.graph)(*inputs)


FAST = {TransformerBlock: FastBlock, Unembed: FastUnembed, TiedUnembed: FastUnembed}


def choose(W: Tensor, weights: str | None) -> Matmul:
    """Return the kernel for `W`, a weight of a model that is optimized with `weights`."""
    return Int8() if weights == "int8" else kernel_for(W.dtype, W.device)
