"""`ResidualStacks`: what each head, attention and MLP of a model adds to the residual stream.

The methods have the same names, arguments and results as in TransformerLens.
"""

from operator import index
from typing import Any, Literal, SupportsIndex

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.support.keywords import checks_keywords
from clean_transformer.support.positions import Positions, at
from clean_transformer.support.validation import refuse_other

Stack = Float[Tensor, "component *batch_pos d_model"]
Labeled = Stack | tuple[Stack, list[str]]
# One direction in the residual stream, or several; and the dot products with a stack's components.
Directions = Float[Tensor, "d_model"] | Float[Tensor, "d_model direction"]
Projected = Float[Tensor, "component *batch_pos"] | Float[Tensor, "component *batch_pos direction"]
Tokens = str | int | Int[Tensor, "..."]


class ResidualStacks:
    """The base class of `ActivationCache`, with methods that analyze the residual stream.

    A component is a tensor that is added to the residual stream, such as the output of an MLP. Most
    methods stack components along a new first axis, `component`. Arguments with the same name mean
    the same in all methods:

    - `layer`: return only the components before this layer (block). None and -1 mean all layers.
    - `mlp_input`: also include the attention of `layer` itself, so that the components add up to
      the residual stream before the MLP of `layer`. This needs a `layer` from 0 to n_layers − 1.
    - `pos_slice`: return only these positions (see `Positions`).
    - `apply_ln`: normalize the components with `apply_ln_to_stack`.
    - `return_labels`: also return a list with the name of each component, such as "0_attn_out".

    Raises `KeyError` if the cache lacks an activation that a method needs.
    """

    model: Any

    @property
    def n_layers(self) -> int:
        """The number of layers (blocks) of the model, or 0 for a module without blocks."""
        return len(getattr(self.model, "blocks", ()))

    def __getitem__(self, key: Any) -> Tensor:
        """Return the activation that `key` selects. `ActivationCache` implements this method."""
        raise NotImplementedError

    @checks_keywords
    def accumulated_resid(
        self,
        layer: SupportsIndex | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Positions = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labeled:
        """Return the residual stream before each block from block 0 to block `layer`.

        If `layer` is None or -1, return the residual stream before every block and after the last
        block. If `incl_mid` is True, also return the residual stream between the attention and the
        MLP of each earlier block. If `mlp_input` is True, also return the residual stream between
        the attention and the MLP of block `layer`. The labels are "0_pre", "0_mid", "1_pre", …,
        "final_post".

        If `apply_ln` is True, and `layer` is None or -1, apply the module ln_final to each
        component, with its gain and its bias. This is the first step of the logit lens.
        """
        end = self._end(layer, mlp_input)
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

    @checks_keywords
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
        """Return the embeddings, and the output of each attention and each MLP before `layer`.

        The components add up to the residual stream before `layer`. With `mode="attn"` or
        `mode="mlp"`, return only the outputs of the attentions or of the MLPs. If `incl_embeds` is
        False, leave out the embeddings.
        """
        refuse_other("mode", mode, "all", "mlp", "attn")
        end = self._end(layer, mlp_input)
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

    @checks_keywords
    def stack_head_results(
        self,
        layer: SupportsIndex = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Positions = None,
        apply_ln: bool = False,
    ) -> Labeled:
        """Return what each attention head before `layer` adds to the residual stream, without b_O.

        If `incl_remainder` is True, the last component is the residual stream before `layer` minus
        the sum of the heads. The labels are "L0H0", "L0H1", …, "remainder".
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

    @checks_keywords
    def get_full_resid_decomposition(
        self,
        layer: SupportsIndex | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Positions = None,
        return_labels: bool = False,
        project_output_onto: Directions | None = None,
    ) -> Labeled | Projected | tuple[Projected, list[str]]:
        """Return the output of each head and neuron, the embeddings, and the sum of the biases.

        The components add up to the residual stream before `layer`. The labels are "L0H0", …,
        "L0N0", …, "embed", "pos_embed", "bias". The bias is the sum of all b_O and b_out. If
        `expand_neurons` is False, the output of each MLP, "0_mlp_out", …, takes the place of the
        output of its neurons, and the bias is the sum of all b_O.

        With `project_output_onto`, return the dot product of each component with each direction.
        This needs little memory, because the output of each neuron [d_model] is not computed.
        """
        end, directions = self._end(layer, mlp_input), project_output_onto
        if directions is not None:
            # The LayerNorm subtracts each component's mean. The dot product with a centered
            # direction is the same with and without the component's mean.
            mean = directions.mean(dim=0) if apply_ln else 0
            directions = (directions - mean).reshape(len(directions), -1)

        def projected(vectors: Tensor) -> Tensor:
            return vectors if directions is None else vectors @ directions

        heads, labels = self.stack_head_results(
            end + mlp_input, pos_slice=pos_slice, return_labels=True
        )
        stacks = [projected(heads)]
        outputs, output_labels = self.decompose_resid(end, pos_slice=pos_slice, return_labels=True)
        kept = ["embed", "pos_embed"]
        bias = sum(block.attn.b_O for block in self.model.blocks[: end + mlp_input])
        if expand_neurons:
            for each, block in enumerate(self.model.blocks[:end]):
                post = at(self["post", each, "mlp"], pos_slice)
                W_out = projected(block.mlp.W_out)
                stacks.append(einsum(post, W_out, "... neuron, neuron out -> neuron ... out"))
                labels += [f"L{each}N{neuron}" for neuron in range(len(W_out))]
                bias = bias + block.mlp.b_out
        else:
            kept = [label for label in output_labels if label.endswith("mlp_out")] + kept
        outputs = outputs[[output_labels.index(label) for label in kept]]
        stacks += [projected(outputs), projected(torch.zeros_like(outputs[:1]) + bias)]
        stack, labels = torch.cat(stacks), [*labels, *kept, "bias"]
        if apply_ln and directions is None:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        elif apply_ln:
            stack = stack / self._scale(end, mlp_input, pos_slice)
        if project_output_onto is not None:
            stack = stack.reshape(*stack.shape[:-1], *project_output_onto.shape[1:])
        return (stack, labels) if return_labels else stack

    @checks_keywords
    def stack_activation(
        self, activation_name: str, layer: SupportsIndex = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Stack one activation of every block before `layer`, such as "pattern", in one tensor.

        `sublayer_type` names the module of the activation, such as "attn"; see `ActivationCache`.
        """
        names = [(activation_name, each, sublayer_type) for each in range(self._end(layer))]
        return torch.stack([self[name] for name in names])

    @checks_keywords
    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: SupportsIndex | None = None,
        mlp_input: bool = False,
        pos_slice: Positions = None,
    ) -> Stack:
        """Subtract each component's mean, and divide by the cached scale of a LayerNorm.

        The LayerNorm is ln1 of the block `layer`, or ln2 of this block if `mlp_input` is True, or
        ln_final if `layer` is None or -1. All components are divided by the same scale. So if the
        components add up to the residual stream, the results add up to the normalized residual
        stream. The gain and the bias of the LayerNorm are not applied.
        """
        centered = residual_stack - residual_stack.mean(dim=-1, keepdim=True)
        return centered / self._scale(self._end(layer, mlp_input), mlp_input, pos_slice)

    @checks_keywords
    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Positions = None,
    ) -> Float[Tensor, "component *batch_pos"]:
        """Return what each component adds to the logit of `tokens`.

        `tokens` is a single token, or a tensor with one token for each input and position of the
        stack, or for each input if the stack has only one position. With `incorrect_tokens`, return
        what each component adds to the logit of `tokens` minus the logit of `incorrect_tokens`.
        Raises `ValueError` for tokens of another shape, and if the shapes of `tokens` and
        `incorrect_tokens` differ. This method does not apply the gain of ln_final, so load the
        model with `fold_ln=True`.
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
        places = residual_stack.shape[1:-1]
        if direction.ndim > 1:
            if [n for n in shapes[0] if n > 1] != [n for n in places if n > 1]:
                raise ValueError(
                    f"tokens have shape {[*shapes[0]]}; give one token, or tokens of {[*places]}"
                )
            direction = direction.reshape(*places, -1)
        normalized = self.apply_ln_to_stack(residual_stack, pos_slice=pos_slice)
        return (normalized * direction).sum(dim=-1)

    def _scale(self, end: int, mlp_input: bool, pos_slice: Positions) -> Tensor:
        place = "ln_final" if end == self.n_layers else f"blocks.{end}.ln{1 + mlp_input}"
        return at(self[f"{place}.hook_scale"], pos_slice)

    def _end(self, layer: SupportsIndex | None, mlp_input: bool = False) -> int:
        """Return `layer` as a number from 0 to n_layers; for None and -1, return n_layers."""
        end = self.n_layers if layer is None or index(layer) == -1 else index(layer)
        if not 0 <= end <= self.n_layers:
            raise ValueError(f"layer is {end}; it must be -1 or from 0 to {self.n_layers}")
        if mlp_input and end == self.n_layers:
            raise ValueError(f"mlp_input=True needs a layer from 0 to {self.n_layers - 1}")
        return end
