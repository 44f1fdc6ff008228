"""`ResidualStacks`: what the components of a model add to the residual stream, from a cache.

The methods have TransformerLens's names, arguments and results.
"""

from operator import index
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.support.left_out import refuse

Stack = Float[Tensor, "component *batch_pos d_model"]
Labeled = Stack | tuple[Stack, list[str]]
Tokens = str | int | Int[Tensor, "..."]
# Some positions: one position, a range (start, end) or (start, end, step), a list of positions, or
# None for all positions. One position removes the position axis.
Positions = int | tuple[int, ...] | list[int] | slice | Tensor | np.ndarray | None


class ResidualStacks:
    """Adds the analysis of the residual stream to `ActivationCache`.

    Each method stacks components of the residual stream along a new first axis, `component`. The
    arguments mean the same in all methods:

    - `layer`: the components before this layer (block). None and -1 mean all components.
    - `mlp_input`: include the attention of `layer` itself, so that the sum of the components is the
      input of the MLP of `layer`.
    - `pos_slice`: the positions (see `Positions`).
    - `apply_ln`: apply the LayerNorm that reads the residual stream at `layer`, as
      `apply_ln_to_stack` does. At the end of the model, this is ln_final.
    - `return_labels`: also return a list with the name of each component, such as "0_attn_out".

    Raises `KeyError` if an activation is needed that was not captured.
    """

    model: Any

    @property
    def n_layers(self) -> int:
        """The number of layers (blocks) of the model, or 0 for a module without blocks."""
        return len(getattr(self.model, "blocks", ()))

    def __getitem__(self, key: Any) -> Tensor:
        """Return the activation that `key` selects."""
        raise NotImplementedError

    def accumulated_resid(
        self,
        layer: SupportsIndex | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Positions = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labeled:
        """Return the residual stream before each block up to `layer`, and after the last block.

        With `incl_mid`, include the residual stream between the attention and the MLP of each
        block. The labels are "0_pre", "0_mid", "1_pre", …, "final_post". At the end of the model,
        `apply_ln` normalizes every component by its own mean and variance, and applies the gain and
        the bias of ln_final. This is the first step of the logit lens.
        """
        end = self._end(layer)
        states: dict[str, Tensor] = {}
        for each in range(end + 1):
            if each == self.n_layers:
                states["final_post"] = self["resid_post", -1]
                continue
            states[f"{each}_pre"] = self["resid_pre", each]
            if (incl_mid and each < end) or (mlp_input and each == end):
                states[f"{each}_mid"] = self["resid_mid", each]
        stack = torch.stack([at(state, pos_slice) for state in states.values()])
        if apply_ln and end == self.n_layers:
            stack = self.model.ln_final(stack)
        elif apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        return (stack, [*states]) if return_labels else stack

    def decompose_resid(
        self,
        layer: SupportsIndex | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Positions = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labeled:
        """Return the outputs that add up to the residual stream before `layer`.

        These are the embeddings (unless `incl_embeds` is False) and the outputs of each attention
        and each MLP. `mode` can choose the attentions or the MLPs alone.
        """
        end = self._end(layer)
        parts = [part for part in ("attn", "mlp") if mode in ("all", part)]
        states = {name: self[name] for name in ("embed", "pos_embed") if incl_embeds}
        for each in range(end):
            states |= {f"{each}_{part}_out": self[f"{part}_out", each] for part in parts}
        if mlp_input and "attn" in parts:
            states[f"{end}_attn_out"] = self["attn_out", end]
        stack = torch.stack([at(state, pos_slice) for state in states.values()])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        return (stack, [*states]) if return_labels else stack

    def stack_head_results(
        self,
        layer: SupportsIndex = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Positions = None,
        apply_ln: bool = False,
    ) -> Labeled:
        """Return what each head before `layer` adds to the residual stream, without b_O.

        With `incl_remainder`, the last component is the rest of the residual stream. The labels are
        "L0H0", "L0H1", …, "remainder".
        """
        end = self._end(layer)
        heads = range(self.model.cfg.n_heads)
        labels = [f"L{each}H{head}" for each in range(end) for head in heads]
        shape = at(self["resid_pre", 0], pos_slice).shape
        results = [self["resid_pre", 0].new_zeros(0, *shape)]
        for each in range(end):
            z = at(self["z", each, "attn"], pos_slice, axis=-3)
            W_O = self.model.blocks[each].attn.W_O
            result = einsum(z, W_O, "... head d_head, head d_head d_model -> ... head d_model")
            results.append(rearrange(result, "... head d_model -> head ... d_model"))
        stack = torch.cat(results)
        if incl_remainder:
            whole = self["resid_post", end - 1] if end else self["resid_pre", 0]
            stack = torch.cat([stack, (at(whole, pos_slice) - stack.sum(0))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: SupportsIndex | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Positions = None,
        return_labels: bool = False,
    ) -> Labeled:
        """Return every head, every MLP, the embeddings, and the sum of the attentions' biases.

        The components add up to the residual stream before `layer`. The labels are "L0H0", …,
        "0_mlp_out", …, "embed", "pos_embed", "bias". Give `expand_neurons=False`: one component per
        neuron needs too much memory. Raises `TypeError` for True, the default of TransformerLens.
        """
        if expand_neurons:
            refuse("get_full_resid_decomposition", ["expand_neurons"])
        end = self._end(layer)
        heads, head_labels = self.stack_head_results(
            end + mlp_input, pos_slice=pos_slice, return_labels=True
        )
        outputs, output_labels = self.decompose_resid(end, pos_slice=pos_slice, return_labels=True)
        names = ["embed", "pos_embed"]
        mlps = [label for label in output_labels if label.endswith("mlp_out")]
        kept = outputs[[output_labels.index(label) for label in mlps + names]]
        b_O = sum(block.attn.b_O for block in self.model.blocks[: end + mlp_input])
        bias = torch.zeros_like(kept[:1]) + b_O
        stack = torch.cat([heads, kept, bias])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        labels = [*head_labels, *mlps, *names, "bias"]
        return (stack, labels) if return_labels else stack

    def stack_activation(
        self, activation_name: str, layer: SupportsIndex = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Return one activation of every block before `layer`, such as "pattern", as one tensor."""
        names = [(activation_name, each, sublayer_type) for each in range(self._end(layer))]
        return torch.stack([self[name] for name in names])

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: SupportsIndex | None = None,
        mlp_input: bool = False,
        pos_slice: Positions = None,
    ) -> Stack:
        """Return the components, centered and divided by the cached scale of a LayerNorm.

        The LayerNorm is ln1 of `layer`, or ln2 with `mlp_input`, or ln_final for None and -1. Its
        scale is that of the whole residual stream, so the components still add up to the normalized
        residual stream. The gain and the bias of the LayerNorm are not applied.
        """
        end = self._end(layer)
        place = "ln_final" if end == self.n_layers else f"blocks.{end}.ln{1 + mlp_input}"
        scale = at(self[f"{place}.hook_scale"], pos_slice)
        return (residual_stack - residual_stack.mean(dim=-1, keepdim=True)) / scale

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Positions = None,
    ) -> Float[Tensor, "component *batch_pos"]:
        """Return what each component adds to the logit of `tokens`.

        `tokens` is one token, or one token for each input, or for each input and position. With
        `incorrect_tokens`, return what each component adds to the difference of the two logits.
        Raises `ValueError` if the shapes of `tokens` and `incorrect_tokens` differ. The gain of
        ln_final is not applied, so load the model with `fold_ln=True`.
        """
        shapes = [getattr(each, "shape", ()) for each in (tokens, incorrect_tokens)]
        if incorrect_tokens is not None and shapes[0] != shapes[1]:
            raise ValueError(
                f"tokens have shape {[*shapes[0]]} and incorrect_tokens {[*shapes[1]]}; they must "
                "have the same shape"
            )
        direction = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            direction = direction - self.model.tokens_to_residual_directions(incorrect_tokens)
        normalized = self.apply_ln_to_stack(residual_stack, pos_slice=pos_slice)
        return (normalized * direction).sum(dim=-1)

    def _end(self, layer: SupportsIndex | None) -> int:
        """Return `layer` as a number from 0 to n_layers. None and -1 are the end of the model."""
        end = self.n_layers if layer is None or index(layer) == -1 else index(layer)
        if not 0 <= end <= self.n_layers:
            raise ValueError(f"layer is {end}; it must be -1 or from 0 to {self.n_layers}")
        return end


def at(activation: Tensor, positions: Positions, axis: int = -2) -> Tensor:
    """Return the activation at some positions. `axis` is the negative index of their axis."""
    if positions is None:
        return activation
    where: Any = slice(*positions) if isinstance(positions, tuple) else positions
    return activation[(..., where, *[slice(None)] * (-axis - 1))]
