"""`check_model`: compares every ATen call of any model with the same call in float64."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.parity.activations.black_box import is_compiled
from clean_transformer.parity.any_model.cached import LastPositions, compare_cached, tensors_in
from clean_transformer.parity.any_model.paths import ModulePaths
from clean_transformer.parity.any_model.results import (
    ModelReport,
    Recorder,
    UseReport,
    floating_dtypes,
)
from clean_transformer.parity.attempts import failed_check
from clean_transformer.parity.operations.check import CallChecker, CheckedCall
from clean_transformer.parity.operations.compiled import BACKWARD, can_watch
from clean_transformer.parity.oracle import trusted, uncompiled_flex_attention
from clean_transformer.parity.verdict import Check, Verdict
from clean_transformer.reports.environment import environment

# The inputs of a model: one tensor, a tuple of positional arguments, or a dict of keyword
# arguments.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

# The number of tokens that `generate` adds to the prompt.
NEW_TOKENS = 4
# Keyword arguments for the `generate` methods of known libraries. An argument is passed only if the
# signature of the method has it.
GENERATE = {"verbose": False, "stop_at_eos": False}


def check_model(
    model: nn.Module, inputs: Inputs, *, on_step: Callable[[str], None] = lambda what: None
) -> ModelReport:
    """Run the model forward, run it backward, call `generate`, and check every ATen call.

    Each ATen call on the model's device is repeated in float64 on the CPU, with the inputs that it
    had on the device. The difference must not exceed the rounding error that the operation may have
    (see `parity/limits.py`). So an error counts only in the call that makes it, not in later calls.
    The check goes on after a wrong call.

    `inputs` is one tensor, a tuple of positional arguments, or a dict of keyword arguments, on the
    model's device. The first integer tensor [batch pos] of the inputs holds the token ids. If the
    model has a method `generate`, its prompt is the token ids without the last 4 ids.

    The backward pass runs if the output requires gradients. If the output has logits [batch pos
    vocab] for the token ids, the loss is the cross entropy of the next tokens. Otherwise each
    element of the outputs is multiplied by a fixed random number, and the loss is the sum. Before
    each run, `on_step` is called with "forward", "backward" or "generate".

    The model runs in evaluation mode, so that dropout is off. At the end, its mode, its gradients
    and the random states of the CPU and of CUDA are restored. In addition to the model and its
    activations, the check needs memory to repeat one call in float64.

    After `generate`, the model runs on the generated text without a cache, and its outputs are
    compared with those that it had while it generated (see `compare_cached`).

    If the model raises an exception in a run, the verdict on this run is ERROR, or NOT CHECKED if
    the device lacks an operation.

    Each call of compiled code is checked as one operation (see `CompiledCall`). Before PyTorch 2.6,
    which cannot do this, raises `ValueError` if a module is compiled.
    """
    if not can_watch():
        _refuse_compiled(model)
    args, kwargs = _arguments(inputs)
    tokens = _tokens((args, kwargs))
    tensors = [*model.parameters(), *model.buffers(), *tensors_in((args, kwargs))]
    report = ModelReport(
        model=type(model).__name__,
        inputs=", ".join(_described(each) for each in tensors_in((args, kwargs))),
        device=str(tensors[0].device) if tensors else "cpu",
        dtypes=floating_dtypes(tensors),
        environment=environment(),
    )
    # The calls (path, call) of compiled code in the backward pass, which is checked with the
    # forward pass of this code.
    compiled_backward: list[tuple[str, CheckedCall]] = []

    if any(is_compiled(part) for part in model.modules()):
        # Compile before `ModulePaths` places its hooks, which the compiler cannot trace. If this
        # call raises an exception, the check of the forward pass raises and reports it again.
        with _undisturbed(model), suppress(Exception):
            model(*args, **kwargs)
    with _undisturbed(model), ModulePaths(model) as paths:

        def check(name: str, run: Callable[[], Any]) -> tuple[UseReport, Any]:
            # Returns the report, and what `run` returns, or None after an exception.
            on_step(name)
            result = None
            use = UseReport(name)
            report.uses.append(use)
            record = Recorder(use, lambda: paths.current)

            def on_call(call: CheckedCall) -> None:
                if call.name.endswith(BACKWARD):
                    compiled_backward.append((paths.current, call))
                else:
                    record(call)

            if name == "backward":
                for path, call in compiled_backward:
                    record.add(path, call)
            try:
                with uncompiled_flex_attention(), CallChecker(on_call):
                    result = run()
            except Exception as error:
                use.failed = failed_check(name, error)
            return use, result

        # In inference mode, PyTorch makes no graph for the backward pass.
        with torch.inference_mode(False), torch.enable_grad():
            use, output = check("forward", lambda: model(*args, **kwargs))
            if use.failed:
                return report
            if any(each.requires_grad for each in tensors_in(output)):
                check("backward", lambda: torch.autograd.backward(_loss(output, tokens)))
            else:
                report.absent["backward"] = "the output does not require gradients"
        del output  # frees the activations
        if not _can_generate(model):
            report.absent["generate"] = "the model has no method generate"
        elif tokens is None:
            reason = "the inputs have no token ids [batch pos] for a prompt"
            failed = Check("generate", Verdict.NOT_CHECKED, note=reason)
            report.uses.append(UseReport("generate", failed=failed))
        else:
            prompt = tokens[:, : max(1, tokens.shape[1] - NEW_TOKENS)]
            with torch.no_grad(), LastPositions(paths.names, len(prompt)) as during:
                use, generated = check("generate", lambda: _generate(model, prompt))
            if use.failed is None:
                use.cached = compare_cached(model, prompt, generated, during, use.roundoff)
    return report


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_compiled(module):
            raise ValueError(
                f"{name or 'the model'} is compiled, but the check would run it uncompiled, to see "
                "its operations; check the model before torch.compile"
            )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Turn on evaluation mode. At the end, restore modes, gradients and random states."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    handles = []
    for parameter, _ in gradients:
        parameter.grad = None
        # To save memory, each gradient is deleted as soon as it is complete.
        if parameter.requires_grad and parameter.is_leaf:
            handles.append(parameter.register_post_accumulate_grad_hook(_forget))  # type: ignore[no-untyped-call]
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(output: Any, tokens: Tensor | None) -> Tensor:
    outputs = [each for each in tensors_in(output) if each.requires_grad]
    logits = getattr(output, "logits", outputs[0])
    if tokens is not None and _predicts(logits, tokens):
        shifted, targets = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        return nn.functional.cross_entropy(shifted, targets.long().to(logits.device))
    generator = torch.Generator().manual_seed(0)
    with trusted():
        factors = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
    products = [(each * factor).sum() for each, factor in zip(outputs, factors, strict=True)]
    return torch.stack(products).sum()


def _predicts(logits: Tensor, tokens: Tensor) -> bool:
    return (
        logits.ndim == 3
        and logits.shape[:2] == tokens.shape
        and tokens.shape[1] > 1
        and int(tokens.max()) < logits.shape[2]
    )


def _can_generate(model: nn.Module) -> bool:
    able = getattr(model, "can_generate", lambda: True)
    return callable(getattr(model, "generate", None)) and bool(able())


def _generate(model: Any, prompt: Tensor) -> Any:
    known = inspect.signature(model.generate).parameters
    options = {name: value for name, value in GENERATE.items() if name in known}
    with warnings.catch_warnings():
        # For example, TransformerLens passes arguments to transformers by their old names.
        warnings.simplefilter("ignore", FutureWarning)
        return model.generate(prompt, max_new_tokens=NEW_TOKENS, **options)


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _tokens(inputs: Any) -> Tensor | None:
    integers = (torch.int64, torch.int32)
    found = (each for each in tensors_in(inputs) if each.dtype in integers and each.ndim == 2)
    return next(found, None)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"
