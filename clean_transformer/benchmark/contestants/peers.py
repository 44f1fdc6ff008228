"""Contestants that run other PyTorch libraries, each with its fastest settings.

The library transformers also runs with other settings (`TransformersEager`).
"""

from pathlib import Path
from typing import Any

import torch

from clean_transformer.benchmark.contestants.base import DTYPES, Contestant, Tokens, any_shape
from clean_transformer.parity.references.hooked_transformer import hooked_model
from clean_transformer.parity.references.transformer_bridge import bridge_around
from clean_transformer.weights.load import read_pretrained


class Transformers(Contestant):
    """`GPT2LMHeadModel` of transformers, with PyTorch's fused attention."""

    package = "transformers"
    imported = "transformers.models.gpt2.modeling_gpt2"
    attention = "sdpa"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model = hugging_face_model(folder, device, DTYPES[dtype], self.attention)

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions; with `last_only`, only for the last position."""
        return self.model(tokens, use_cache=False, logits_to_keep=int(last_only)).logits

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        both = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
        )
        return both[:, tokens.shape[1] :]


class TransformersEager(Transformers):
    """`GPT2LMHeadModel` with explicit attention, which computes the whole attention pattern."""

    attention = "eager"


class TransformersCompiled(Transformers):
    """`GPT2LMHeadModel` whose forward pass is compiled by `torch.compile`."""

    generate = Contestant.generate  # not measured, because each length would compile again

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.model.compile(dynamic=any_shape(device))


class TransformersStatic(Transformers):
    """`GPT2LMHeadModel` whose decoding step is compiled, with a KV cache of fixed size.

    gpt-fast made this method known (Meta 2023, https://github.com/meta-pytorch/gpt-fast).
    """

    forward = Contestant.forward  # the same as in `Transformers`
    step = 256  # the KV cache has a multiple of this many positions; each size is compiled anew

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        from transformers import CompileConfig, StaticCache

        on_every_device = CompileConfig(fullgraph=False, mode="default")
        on_every_device._compile_all_devices = True  # transformers itself compiles on GPUs only
        room = -(-(tokens.shape[1] + new) // self.step) * self.step
        both = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            past_key_values=StaticCache(self.model.config, max_cache_len=room),
            compile_config=on_every_device,
        )
        return both[:, tokens.shape[1] :]


class NNsight(Transformers):
    """nnsight, which reads the output of every module of `GPT2LMHeadModel`."""

    package = imported = "nnsight"
    attention = "eager"  # only explicit attention computes the attention pattern
    generate = Contestant.generate  # the same as in `TransformersEager`

    def capture(self, tokens: Tokens) -> Any:
        """Run a forward pass, and return the logits and the outputs of all modules."""
        import nnsight

        traced = nnsight.NNsight(self.model)
        with traced.trace(tokens, use_cache=False, output_attentions=True) as tracer:
            cache = tracer.cache()
            logits = traced.output.save()
        return logits, cache


class HookedTransformer(Contestant):
    """`HookedTransformer` of TransformerLens 3."""

    package = "transformer_lens"
    imported = "transformer_lens"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        weights = read_pretrained(folder, torch.device("cpu"), DTYPES[dtype])
        self.model = hooked_model(*weights).to(device, print_details=False)

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions. Raises `NotImplementedError` with `last_only`."""
        if last_only:
            raise NotImplementedError("it cannot compute the last logits alone")
        return self.model(tokens)

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        both = self.model.generate(
            tokens,
            max_new_tokens=new,
            stop_at_eos=False,
            do_sample=False,
            use_past_kv_cache=True,
            verbose=False,
            return_type="tokens",
        )
        return both[:, tokens.shape[1] :]

    def capture(self, tokens: Tokens) -> Any:
        """Run a forward pass, and return the logits and a cache of all activations."""
        return self.model.run_with_cache(tokens)


class TransformerBridge(HookedTransformer):
    """`TransformerBridge` of TransformerLens 4, which wraps Hugging Face's model."""

    def __init__(self, folder: Path, device: str, dtype: str):
        Contestant.__init__(self, folder, device, dtype)
        theirs = hugging_face_model(folder, device, DTYPES[dtype], "eager")
        self.model = bridge_around(theirs, device, DTYPES[dtype])


def hugging_face_model(folder: Path, device: str, dtype: torch.dtype, attention: str) -> Any:
    """Load a `GPT2LMHeadModel` without dropout. <|endoftext|> does not stop its generation.

    `attention` is "sdpa" (PyTorch's fused attention) or "eager" (explicit attention).
    """
    from transformers import GPT2LMHeadModel

    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = GPT2LMHeadModel.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, **no_dropout
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()
