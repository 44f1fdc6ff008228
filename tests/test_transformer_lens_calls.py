"""The calls that people's notebooks make on TransformerLens's models, on theirs and on ours.

Each row is a kind of call, with the number of its uses in 15 public notebooks. Each call is run as
written on both models, which have the same weights and the same tokenizer. `LEFT_OUT_ROWS` are the
rows that this package leaves out, and what its error says.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.hooked_transformer import hooked_model
from clean_transformer.parity.references.huggingface import gpt2_lm_head_model
from clean_transformer.parity.references.transformer_bridge import bridge_around
from clean_transformer.text.tokenizer import END_OF_TEXT

from .helpers import assert_same_function, quietly, reading_model, trained

pytest.importorskip("transformer_lens")

TEXT = "the cat sat on the mat"
TEXTS = ["the cat", "sat on"]  # two tokens each
UNEQUAL = ["the cat sat", "mat"]

# (uses, row): calls. An attribute of TransformerBridge has another name if the row is "hooked".
ROWS: dict[tuple[int, str], list[str]] = {
    (196, "cfg"): [
        f"model.cfg.{name}"
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx", "d_mlp")
    ],
    (113, "cache by shorthand"): [
        "cache['pattern', 0]",
        "cache['z', -1, 'attn']",
        "cache['blocks.0.hook_resid_pre']",
        "cache['embed']",
        "cache['resid_post', np.int64(1)]",
        "cache['resid_post', torch.tensor(1).item()]",
        "cache['scale', 1, 'ln2']",
    ],
    (61, "to_str_tokens"): [
        "model.to_str_tokens(TEXT)",
        "model.to_str_tokens(TEXT, prepend_bos=False)",
        "model.to_str_tokens(tokens[0])",
        "model.to_str_tokens(UNEQUAL)",
    ],
    (50, "run_with_cache"): ["model.run_with_cache(tokens)[0]", "len(cache) > 0"],
    (36, "to_tokens"): [
        "model.to_tokens(TEXT)",
        "model.to_tokens(TEXTS, prepend_bos=False)",
        "model.to_tokens(UNEQUAL)",
        "model.to_tokens(UNEQUAL, padding_side='left')",
        "model.to_tokens(TEXT, prepend_bos=None)",
    ],
    (34, "model(tokens)"): ["model(tokens)"],
    (34, "get_act_name"): [
        "cache[utils.get_act_name('q', 1)]",
        "cache[utils.get_act_name('resid_mid', 0)]",
    ],
    (32, "run_with_hooks"): [
        "model.run_with_hooks(tokens, fwd_hooks=[('blocks.0.attn.hook_z', without_head)])",
        "model.run_with_hooks(tokens, fwd_hooks=[(is_pattern, without_head)])",
        "model.run_with_hooks(tokens, fwd_hooks=[('blocks.1.hook_resid_pre', in_place)])",
    ],
    (30, "weights of modules"): [
        "model.unembed.W_U",
        "model.unembed.b_U",
        "model.embed.W_E",
        "model.blocks[0].attn.W_Q",
        "model.blocks[torch.tensor(1)].mlp.W_in",
    ],
    (28, "stacked attention weights"): ["model.W_Q", "model.W_K", "model.W_V", "model.W_O"],
    (25, "to_string"): ["model.to_string(tokens[0])", "model.to_string(tokens)"],
    (24, "cache_dict"): ["cache.cache_dict['hook_embed']"],
    (23, "cfg.device"): ["str(model.cfg.device)", "model.cfg.dtype"],
    (23, "to_single_token"): ["model.to_single_token(' cat')", "model.to_single_str_token(5)"],
    (22, "texts"): [
        "model(TEXT)",
        "model(TEXTS)",
        "model.run_with_cache(TEXT)[0]",
        "model.run_with_hooks(TEXT, fwd_hooks=[('blocks.0.attn.hook_z', without_head)])",
        "model(UNEQUAL)",
    ],
    (21, "run_with_hooks(return_type=)"): [
        f"model.run_with_hooks(tokens, return_type={kind}, fwd_hooks=[(is_pattern, without_head)])"
        for kind in ("'loss'", "None", "'logits'")
    ],
    (20, "reset_hooks"): ["model.reset_hooks()", "model.reset_hooks(including_permanent=True)"],
    (20, "FactoredMatrix"): [
        "FactoredMatrix(model.W_V, model.W_O).AB",
        "FactoredMatrix(model.W_Q, model.W_K.transpose(-2, -1)).norm()",
    ],
    (1, "OV, QK"): [
        *("model.OV.AB", "model.QK.AB", "model.OV.shape", "model.QK[1, 2].AB"),
        "model.OV.eigenvalues.abs().sort().values",
        "(model.QK @ model.OV).norm()",
        "model.blocks[0].attn.OV.AB",
        "model.blocks[1].attn.QK.AB",
    ],
    (18, "W_E, W_pos, W_U, b_U"): [
        *("model.W_E", "model.W_pos", "model.W_U", "model.b_U", "model.W_E_pos"),
    ],
    (16, "hook.name"): ["seen(lambda hook: hook.name)"],
    (15, "state"): [
        "model.train().eval() is model",
        "'embed.W_E' in dict(model.named_parameters())",
        "len(model.load_state_dict(model.state_dict()).missing_keys)",
    ],
    (14, "hook.layer()"): ["seen(lambda hook: hook.layer())"],
    (13, "names_filter"): [
        "only(names_filter='blocks.0.hook_resid_pre')",
        "only(names_filter=['blocks.0.hook_resid_pre', 'blocks.1.attn.hook_z'])",
        "only(names_filter=is_pattern)",
        "only(names_filter=lambda name: 'hook_q' in name)",
        "sorted(only(names_filter=lambda name: name.startswith('blocks.')))",
        "edited(lambda name: 'attn' in name)",
        "edited(lambda name: 'mlp' in name)",
        "edited(lambda name: name.endswith('_in'))",
        "edited(lambda name: True)",
    ],
    (13, "run_with_cache(return_type=)"): [
        f"model.run_with_cache(tokens, return_type={kind})[0]"
        for kind in ("None", "'logits'", "'loss'")
    ],
    (13, "stack_activation"): [
        "cache.stack_activation('pattern')",
        "cache.stack_activation('resid_pre', 1)",
        "cache.stack_activation('z', -1, 'attn')",
    ],
    (12, "tokenizer"): [
        "model.tokenizer.encode(TEXT)",
        "model.tokenizer.decode(tokens[0, 1:])",
        "model.tokenizer.decode(5)",
        "model.tokenizer.batch_decode(tokens[:, 1:])",
        "model.tokenizer.batch_decode(tokens[0, 1:])",
        "model.tokenizer.batch_decode([tokens[0, 1:], tokens[1, :2]])",
        "model.tokenizer.decode(model.to_tokens(TEXT)[0], skip_special_tokens=True)",
        "model.tokenizer.vocab['the']",
        "model.tokenizer.vocab_size",
        "model.tokenizer(TEXT).input_ids",
        "dict(model.tokenizer(UNEQUAL))",
        "dict(model.tokenizer(UNEQUAL, padding=True))",
        "dict(model.tokenizer(UNEQUAL, padding=True, return_tensors='pt'))",
        "model.tokenizer.tokenize(TEXT)",
        "model.tokenizer.bos_token + model.tokenizer.eos_token",
        "model.tokenizer.pad_token_id",
    ],
    (12, "detect_head"): [
        f"detect_head(model, TEXT, {kind!r}, exclude_bos=True, error_measure={error!r})"
        for kind in ("previous_token_head", "duplicate_token_head", "induction_head")
        for error in ("mul", "abs")
    ],
    (11, "test_prompt"): ["printed(utils.test_prompt, TEXT, 'cat', model)"],
    (10, "stack_head_results"): [
        "cache.stack_head_results()",
        "cache.stack_head_results(layer=1, pos_slice=-1, return_labels=True)",
        "cache.stack_head_results(-1, True, incl_remainder=True, pos_slice=(1, 4))",
        "cache.stack_head_results(apply_ln=True)",
        "single.stack_head_results(pos_slice=-1)",
    ],
    (9, "model(return_type=)"): [
        "model(tokens, return_type='loss')",
        "model(TEXT, return_type='loss')",
        "tuple(model(tokens, return_type='both'))",
        "model(tokens, return_type='both').loss",
        "model(tokens, return_type='loss', loss_per_token=True)",
        "model(tokens, return_type=None)",
        "model(UNEQUAL, return_type='loss', padding_side='left')",
    ],
    (7, "remove_batch_dim"): ["single['blocks.0.attn.hook_pattern']"],
    (7, "generate"): [
        "model.generate(tokens, max_new_tokens=3, temperature=0.0)",
        "generated_with('ln_final.hook_normalized')",
    ],
    (0, "left-padded token ids"): [
        "left_padded(lambda tokens: model(tokens)[:, -1])",
        "left_padded(lambda tokens: model(tokens, return_type='loss'))",
        "left_padded(lambda tokens: model(tokens, stop_at_layer=1)[:, -1])",
        "left_padded(lambda tokens: model.run_with_cache(tokens)[1]['resid_mid', 1][:, -1])",
        "left_padded(lambda tokens: model.generate(tokens, max_new_tokens=2, temperature=0.0))",
    ],
    (7, "get_full_resid_decomposition"): [
        "cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)",
        "cache.get_full_resid_decomposition(1, True, False, True, pos_slice=-1)",
        "cache.get_full_resid_decomposition(pos_slice=-1, apply_ln=True, return_labels=True)",
        "cache.get_full_resid_decomposition(layer=1, mlp_input=True, apply_ln=True)",
        "cache.get_full_resid_decomposition(0)",
        "single.get_full_resid_decomposition(layer=-1, pos_slice=(1, 4))",
        "cache.decompose_resid(pos_slice=utils.Slice(-1))",
        "cache.decompose_resid(pos_slice=utils.Slice((1, 4)))",
        "cache.decompose_resid(pos_slice=utils.Slice([0, 2]))",
        "cache.decompose_resid(pos_slice=utils.Slice())",
        *(
            f"cache.get_full_resid_decomposition({arguments}project_output_onto={directions})"
            for arguments in ("", "apply_ln=True, pos_slice=-1, ", "1, True, False, True, ")
            for directions in ("W_U[:, 3]", "W_U[:, [3, 8]]", "W_U[:, [3]]")
        ),
    ],
    (4, "add_hook"): [
        "added(dir='fwd')",
        "added(dir='bwd')",
        "added(dir='fwd', to_point=True)",
        "added(dir='bwd', to_point=True)",
    ],
    (6, "items, keys, values"): [
        "dict(cache.items())['hook_embed']",
        "'hook_embed' in cache.keys()",
        "len([*cache.values()]) == len(cache)",
    ],
    (5, "tokens_to_residual_directions"): [
        "model.tokens_to_residual_directions(tokens)",
        "model.tokens_to_residual_directions(' cat')",
        "model.tokens_to_residual_directions(7)",
        "model.tokens_to_residual_directions(tokens[0, 1])",
    ],
    (5, "accumulated_resid"): [
        "cache.accumulated_resid()",
        "cache.accumulated_resid(layer=1, incl_mid=True, return_labels=True)",
        "cache.accumulated_resid(-1, incl_mid=True, pos_slice=-1, return_labels=True)",
        "cache.accumulated_resid(layer=1, apply_ln=True, mlp_input=True, pos_slice=[0, 2])",
        "cache.accumulated_resid(apply_ln=True)",
    ],
    (5, "decompose_resid"): [
        "cache.decompose_resid(return_labels=True)",
        "cache.decompose_resid(layer=1, mlp_input=True, mode='attn', apply_ln=True)",
        "cache.decompose_resid(mode='mlp', incl_embeds=False, pos_slice=torch.tensor([1]))",
    ],
    (4, "get_token_position"): [
        "model.get_token_position(' cat', TEXT)",
        "model.get_token_position('the', model.to_tokens(TEXT))",
        "model.get_token_position(' the', TEXT, mode='last', prepend_bos=False)",
    ],
    (4, "prepend_bos"): ["model(TEXT, prepend_bos=False)"],
    (4, "bos_token_id"): ["model.tokenizer.bos_token_id"],
    (4, "their ActivationCache"): [
        "Theirs(dict(cache), model).stack_head_results(return_labels=True)",
        "Theirs(dict(cache), model).logit_attrs(cache.decompose_resid(), ' cat')",
        "Theirs(dict(cache), model).accumulated_resid(apply_ln=True)",
        "Theirs(dict(cache), model).stack_neuron_results(-1, pos_slice=-1)",
    ],
    (4, "apply_ln_to_stack"): [
        "cache.apply_ln_to_stack(cache.decompose_resid())",
        "cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=-1), layer=-1, pos_slice=-1)",
        "cache.apply_ln_to_stack(cache.decompose_resid(1), 1, mlp_input=True)",
    ],
    (4, "SVDInterpreter"): [
        "SVDInterpreter(half).get_singular_vectors('w_out', 1, num_vectors=2).abs()",
        "SVDInterpreter(half).get_singular_vectors('w_in', 0, num_vectors=2).abs()",
        "SVDInterpreter(half).get_singular_vectors('OV', 0, num_vectors=2, head_index=1).abs()",
    ],
    (18, "patching"): [
        f"patching.get_act_patch_{kind}(model, tokens, other, lambda x: x[:, -1, 5].mean())"
        for kind in (
            *("resid_pre", "attn_out", "mlp_out", "attn_head_out_all_pos"),
            *("attn_head_pattern_all_pos", "attn_head_out_by_pos", "block_every"),
        )
    ],
    (3, "model.hooks"): ["within()", "within(generating=True)"],
    (3, "hook_dict"): ["model.hook_dict['blocks.0.attn.hook_z'].name"],
    (2, "cache.remove_batch_dim()"): ["removed()['blocks.0.attn.hook_pattern']"],
    (1, "stop_at_layer"): [
        "model(tokens, stop_at_layer=1)",
        "model(tokens, stop_at_layer=-1)",
        "model(tokens, stop_at_layer=0)",
        "[*model.run_with_cache(tokens, stop_at_layer=1)[1]][-1]",
    ],
    (1, "device"): ["model.run_with_cache(tokens, device='cpu')[1]['hook_embed']"],
    (1, "loss_fn"): [
        "model.loss_fn(model(tokens), tokens)",
        "model.loss_fn(model(tokens), tokens, per_token=True)",
    ],
    (0, "other stacked weights"): [
        *("model.W_in", "model.W_out", "model.b_Q", "model.b_K"),
        *("model.b_V", "model.b_O", "model.b_in", "model.b_out"),
    ],
    (0, "logit_attrs"): [
        "cache.logit_attrs(cache.decompose_resid(), ' cat')",
        "cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens[:, 1], tokens[:, 2], -1)",
        "cache.logit_attrs(cache.stack_head_results(), tokens, incorrect_tokens=other_tokens)",
    ],
}

# Calls that TransformerBridge does not have, or whose result has other names there.
ONLY_HOOKED = {
    "model(UNEQUAL, return_type='loss', padding_side='left')",
    "model(tokens, return_type='both').loss",
    "model.hook_dict['blocks.0.attn.hook_z'].name",
    "seen(lambda hook: hook.name)",
    "'embed.W_E' in dict(model.named_parameters())",
    "only(names_filter='blocks.0.hook_resid_pre')",
    "only(names_filter=['blocks.0.hook_resid_pre', 'blocks.1.attn.hook_z'])",
    "model.blocks[0].attn.OV.AB",
    "model.blocks[1].attn.QK.AB",
    *ROWS[13, "names_filter"][4:],
    *ROWS[0, "left-padded token ids"],
}

# (uses, row): calls that raise an error here, and a part of its message.
LEFT_OUT_ROWS: dict[tuple[int, str], dict[str, str]] = {
    (24, "SAELens"): {
        "model.run_with_saes(tokens)": "run_with_hooks",
        "model.run_with_cache_with_saes(tokens)": "run_with_hooks",
    },
    (7, "generate(verbose=, do_sample=)"): {
        "model.generate(tokens, verbose=False)": "prints nothing",
        "model.generate(tokens, do_sample=False)": "temperature=0, the default",
    },
    (2, "permanent hooks, hook levels"): {
        "model.add_hook('hook_embed', in_place, is_permanent=True)": "no hook is permanent",
        "model.add_hook('hook_embed', in_place, level=1)": "no hook is permanent",
        "model.reset_hooks(level=1)": "no hook is permanent",
        "model.hook_dict['hook_embed'].add_hook(in_place, level=1)": "no hook is permanent",
    },
    (5, "hook.ctx"): {"seen(lambda hook: hook.ctx)": "variable of your own"},
    (4, "set_use_attn_result"): {"model.set_use_attn_result(True)": "there is no switch"},
    (2, "set_use_split_qkv_input, set_use_hook_mlp_in"): {
        "model.set_use_split_qkv_input(True)": "there is no switch",
        "model.set_use_hook_mlp_in(True)": "there is no switch",
    },
    (2, "evals"): {"model.load_sample_training_dataset()": "return_type='loss'"},
    (0, "past_kv_cache and others"): {
        "model(tokens, past_kv_cache=None)": "kv_cache=KVCache",
        "model(tokens, start_at_layer=1)": "for block in model.blocks",
        "model.run_with_cache(tokens, incl_bwd=True)": "bwd_hooks",
        "model.run_with_cache(tokens, pos_slice=-1)": "slice the activations",
        "model.run_with_hooks(tokens, fwd_hooks=[], clear_contexts=True)": "leave the argument out",
        "cache.compute_head_results()": "stack_head_results",
        "cache.stack_neuron_results(1)": "get_full_resid_decomposition",
        "model.all_composition_scores('Q')": r"composition_scores\(model.OV, model.QK\)",
    },
}

# (uses, row): the test that replays the row.
ELSEWHERE = {
    (23, "from_pretrained(fold_ln=, …)"): "test_weights_are_processed_while_they_are_loaded",
    (13, "circuitsvis"): "test_circuitsvis_draws_our_cache",
}
# The call sites that were counted in the 15 notebooks.
ALL_USES = 1130


def with_their_tokenizer() -> Any:
    """The tokenizer of `reading_model`, as a tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained(), padding_side="right", **special)
    # Otherwise TransformerLens would load the tokenizer again, from the hub.
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """TransformerLens makes some tensors of zeros in PyTorch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def ours() -> DemoTransformer:
    return reading_model(b_U=False).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(ours: DemoTransformer, installed: str) -> Any:
    """A model of the installed TransformerLens with the weights and the tokenizer of `ours`."""
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    if installed == "hooked":
        model = quietly(hooked_model, ours.cfg, state)
        model.set_tokenizer(with_their_tokenizer())
        return model.eval().requires_grad_(False)
    bridge = quietly(bridge_around, gpt2_lm_head_model(ours.cfg, state), "cpu", torch.float64)
    bridge.tokenizer = with_their_tokenizer()
    return bridge.eval().requires_grad_(False)


def without_head(activation: Tensor, hook: Any) -> Tensor:
    """Remove what head 1 gives, of z or of a pattern."""
    activation = activation.clone()
    if hook.name.endswith("pattern"):
        activation[:, 1] = 0
    else:
        activation[:, :, 1] = 0
    return activation


def in_place(activation: Tensor, hook: Any) -> None:
    activation[:, 1] += 1


def is_pattern(name: str) -> bool:
    return name.endswith("hook_pattern")


def names(model: Any) -> dict[str, Any]:
    """What the calls name: the model, its caches, and small functions that use them."""
    import transformer_lens
    from transformer_lens import patching, utilities
    from transformer_lens.head_detector import detect_head

    tokens = torch.tensor([[256, 3, 90, 17, 5], [0, 8, 200, 4, 4]])

    def seen(read: Any) -> list[Any]:
        found: list[Any] = []
        hooks = [("blocks.1.hook_resid_mid", lambda activation, hook: found.append(read(hook)))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return found

    def only(**arguments: Any) -> dict[str, Tensor]:
        return dict(model.run_with_cache(tokens, **arguments)[1])

    def added(dir: str, to_point: bool = False) -> Tensor:
        found: list[Tensor] = []

        def hook(value: Tensor, hook: Any) -> None:
            found.append(value.detach().clone())

        model.requires_grad_(True)
        if to_point:
            model.hook_dict["blocks.0.hook_resid_post"].add_hook(hook, dir)
        else:
            model.add_hook("blocks.0.hook_resid_post", hook, dir)
        model(tokens, return_type="loss").backward()
        model.reset_hooks()
        model.zero_grad()
        model.requires_grad_(False)
        return found[0]

    def edited(selects: Callable[[str], bool]) -> Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=[(selects, lambda x, hook: x * 0.5)])

    def generated_with(name: str) -> Tensor:
        def flip(activation: Tensor, hook: Any) -> Tensor:
            first = activation[:, :1].flip(-1)
            return torch.cat([first, activation[:, 1:]], dim=1)

        with model.hooks(fwd_hooks=[(name, flip)]):
            return model.generate(tokens, max_new_tokens=1, temperature=0.0)

    def left_padded(read: Callable[[Tensor], Any]) -> Any:
        before, model.tokenizer.padding_side = model.tokenizer.padding_side, "left"
        try:
            return read(model.to_tokens(UNEQUAL))
        finally:
            model.tokenizer.padding_side = before

    def within(generating: bool = False) -> Tensor:
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", without_head)]):
            if generating:
                return model.generate(tokens, max_new_tokens=3, temperature=0.0)
            return model(tokens)

    def printed(function: Any, *arguments: Any) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            function(*arguments)
        return text.getvalue()

    def removed() -> Any:
        cache = model.run_with_cache(tokens[:1])[1]
        cache.remove_batch_dim()
        return cache

    return {
        **{"TEXT": TEXT, "TEXTS": TEXTS, "UNEQUAL": UNEQUAL, "torch": torch, "np": np},
        **{"without_head": without_head, "in_place": in_place, "is_pattern": is_pattern},
        **{"seen": seen, "only": only, "added": added, "within": within, "printed": printed},
        **{"edited": edited, "generated_with": generated_with, "left_padded": left_padded},
        **{
            "W_U": model.unembed.W_U,
            "model": model,
            "tokens": tokens,
            "removed": removed,
            "other_tokens": tokens.flip(0),
        },
        "cache": model.run_with_cache(tokens)[1],
        "single": model.run_with_cache(tokens[:1], remove_batch_dim=True)[1],
        "other": model.run_with_cache(tokens.flip(0))[1],
        "half": deepcopy(model).float(),  # SVDInterpreter computes in float32
        **{"patching": patching, "utils": utilities, "detect_head": detect_head},
        "FactoredMatrix": transformer_lens.FactoredMatrix,
        "SVDInterpreter": transformer_lens.SVDInterpreter,
        "Theirs": transformer_lens.ActivationCache,
    }


def assert_equal(ours: Any, theirs: Any) -> None:
    """Assert that two results are equal, except for rounding."""
    if isinstance(ours, Tensor) and ours.is_floating_point():
        assert_same_function(ours, theirs)
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)) and not isinstance(ours, SimpleNamespace):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def our_names(ours: DemoTransformer, installed: str) -> dict[str, Any]:
    return names(ours)


@pytest.fixture(scope="module")
def their_names(theirs: Any) -> dict[str, Any]:
    return names(theirs)


Outcome = Callable[[str], Exception | None]


@pytest.fixture(scope="module")
def outcome(our_names: dict[str, Any], their_names: dict[str, Any]) -> Outcome:
    """A function that runs a call on both models once, and returns the error or difference."""

    @cache
    def run(call: str) -> Exception | None:
        try:
            assert_equal(eval(call, dict(our_names)), quietly(eval, call, dict(their_names)))
        except Exception as error:
            return error
        return None

    return run


CALLS = [call for calls in ROWS.values() for call in calls]


@pytest.mark.parametrize("call", CALLS)
def test_the_call_gives_what_theirs_gives(outcome: Outcome, installed: str, call: str):
    if call in ONLY_HOOKED and installed != "hooked":
        pytest.skip("TransformerBridge has no such call")
    if error := outcome(call):
        raise error


def test_97_percent_of_the_uses_that_are_not_left_out_work(outcome: Outcome, installed: str):
    counted, working = 0, 0
    for (uses, _), calls in ROWS.items():
        here = [call for call in calls if installed == "hooked" or call not in ONLY_HOOKED]
        counted += uses if here else 0
        working += uses if here and not any(map(outcome, here)) else 0
    print(f"{working} of {counted} call sites give what TransformerLens's give")
    assert working / counted >= 0.97


def test_every_use_is_counted():
    tests = [*Path(__file__).parent.glob("t*/*.py"), *Path(__file__).parent.glob("test_in*.py")]
    defined = "".join(file.read_text(encoding="utf-8") for file in tests)
    assert all(f"def {name}(" in defined for name in ELSEWHERE.values())
    rows = [*ROWS, *LEFT_OUT_ROWS, *ELSEWHERE]
    assert len({row for _, row in rows}) == len(rows)
    assert sum(uses for uses, _ in rows) == ALL_USES


@pytest.mark.parametrize(
    ("call", "message"), [pair for row in LEFT_OUT_ROWS.values() for pair in row.items()]
)
def test_the_call_is_refused_and_says_what_to_use(
    our_names: dict[str, Any], call: str, message: str
):
    with pytest.raises((AttributeError, TypeError), match=message):
        eval(call, dict(our_names))
