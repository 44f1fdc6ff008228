"""TransformerLens's methods and arguments that this package lacks, and what to use instead."""

from collections.abc import Iterable

_ALWAYS_ON = (
    "there is no switch: an activation is computed when `names_filter`, `fwd_hooks` or `bwd_hooks` "
    "names its hook point"
)
_NO_PERMANENT = (
    "no hook is permanent or has a level; use run_with_hooks(...), `with model.hooks(...)`, or "
    "add_hook(name, function) until reset_hooks()"
)
_NOTHING_STAYS = "run_with_hooks and run_with_cache leave no hook behind; leave the argument out"
_NEURONS = (
    "get_full_resid_decomposition() stacks the output of every neuron; cache['post', layer] and "
    "model.W_out[layer] hold the factors"
)
_KV_CACHE = "pass kv_cache=KVCache(n_layers, n_ctx); KVCache is in clean_transformer"
_EVALS = "compute the loss of your texts with model(texts, return_type='loss')"
_SAES = "run_with_hooks(text, fwd_hooks=[(name, lambda activation, hook: sae(activation))])"

# The keys are names in TransformerLens: attributes, methods, and arguments of methods. The values
# say what to use instead.
LEFT_OUT = {
    **dict.fromkeys(
        (
            "set_use_attn_result",
            "set_use_split_qkv_input",
            "set_use_attn_in",
            "set_use_hook_mlp_in",
            "use_attn_result",
        ),
        _ALWAYS_ON,
    ),
    **dict.fromkeys(
        (
            "is_permanent",
            "level",
            "prepend",
            "add_perma_hook",
            "remove_hooks",
            "remove_all_hook_fns",
        ),
        _NO_PERMANENT,
    ),
    **dict.fromkeys(("reset_hooks_end", "clear_contexts"), _NOTHING_STAYS),
    **dict.fromkeys(("get_neuron_results", "stack_neuron_results"), _NEURONS),
    **dict.fromkeys(("run_with_saes", "run_with_cache_with_saes", "saes", "add_sae"), _SAES),
    **dict.fromkeys(("load_sample_training_dataset", "sample_datapoint"), _EVALS),
    "past_kv_cache": _KV_CACHE,
    "attention_mask": "pass kv_cache=KVCache(n_layers, n_ctx, attention_mask=...)",
    "start_at_layer": "call the modules: `for block in model.blocks[start:]: x = block(x)`",
    "ctx": "keep the value in a variable of your own, which the hook function can read",
    "clear_context": "a hook point keeps nothing",
    "incl_bwd": "store the gradients with bwd_hooks=[(name, function)]",
    "pos_slice": "slice the activations of the cache: cache[name][:, start:end]",
    "return_cache_object": "the cache is a mapping; dict(cache) is a dictionary",
    "compute_head_results": "stack_head_results() returns the output of every head",
    "apply_slice_to_batch_dim": "slice the activations: cache[name][start:end]",
    "batch_slice": "slice the activations: cache[name][start:end]",
    "has_batch_dim": "leave it out: a stack may have any axes between component and d_model",
    "recompute_ln": "accumulated_resid(apply_ln=True) and analysis.logit_lens apply ln_final anew",
    "toggle_autodiff": "use `with torch.no_grad():`",
    "all_composition_scores": "use transformer_lens.utilities: composition_scores(model.OV, "
    "model.QK)",
    "verbose": "generate prints nothing; stream(...) yields the text in pieces",
    "do_sample": "temperature=0, the default, takes the most likely token; above 0 draws tokens",
    "stop_at_eos": "stop_tokens=[...] says where to stop; stop_tokens=[] never stops",
    "eos_token_id": "stop_tokens=[...] says where to stop",
    "use_past_kv_cache": "generate always uses a KV cache",
    "freq_penalty": "the name is frequency_penalty",
    "input": "give the prompt as the first argument",
    "mod_dict": "use dict(model.named_modules())",
    "hook_points": "use model.hook_dict.values()",
    "all_head_labels": 'write f"L{layer}H{head}" in a loop',
    "accumulated_bias": "add up model.b_O and model.b_out, which have one row for each layer",
    **dict.fromkeys(
        ("add_caching_hooks", "get_caching_hooks", "cache_all", "cache_some"),
        "run_with_cache(names_filter=...) returns the activations",
    ),
    "process_weights_": "load the weights with from_pretrained(..., fold_ln=True, ...)",
    "refactor_factored_attn_matrices": "the weights stay as trained, or are folded and centered",
}


class NoValue(AttributeError, ValueError):
    """Raised by a property that has no value in this model. `hasattr(model, name)` is then False.

    It is also a `ValueError`, because a method that reads the property was given a wrong argument.
    """


def has_no(owner: object, name: str) -> str:
    """Return the message of the `AttributeError` for a missing attribute `name` of `owner`.

    If TransformerLens has the attribute (see `LEFT_OUT`), the message says what to use instead.
    """
    instead = f": {LEFT_OUT[name]}" if name in LEFT_OUT else ""
    return f"{type(owner).__name__!r} has no attribute {name!r}{instead}"


def refuse(function: str, arguments: Iterable[str]) -> None:
    """Raise `TypeError`, which says that `function` does not take the first of `arguments`.

    `function` and `arguments` are names. If TransformerLens has the argument (see `LEFT_OUT`), the
    message says what to use instead. If `arguments` is empty, nothing is raised.
    """
    for name in arguments:
        instead = f": {LEFT_OUT[name]}" if name in LEFT_OUT else ""
        raise TypeError(f"{function}() takes no argument {name!r}{instead}")


def refuse_known(function: str, arguments: Iterable[str]) -> None:
    """Raise `TypeError` if one of `arguments` is in `LEFT_OUT`.

    `function` and `arguments` are names. The keys of `LEFT_OUT` are the names that TransformerLens
    has and this package lacks. The values, which the error shows, say what to use instead.
    """
    refuse(function, (name for name in arguments if name in LEFT_OUT))
