from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from clean_transformer.parity import references
from clean_transformer.parity.references import base, huggingface
from clean_transformer.parity.references.base import LOGITS, ReferenceUnavailable
from clean_transformer.parity.references.choose import (
    REFERENCES,
    choose_reference,
    implementations,
)

from ...helpers import TINY, needs, quietly, random_model, random_tokens, reference_model, tiny

TOKENS = random_tokens()


@pytest.mark.parametrize("kind", REFERENCES)
@torch.no_grad()
def test_a_reference_runs_in_the_dtype_of_its_weights(installed: str, kind: str):
    needs(kind, installed)
    state = random_model(dtype=torch.float32).state_dict()
    cache = quietly(REFERENCES[kind], TINY, state).run(TOKENS)
    assert cache[LOGITS].dtype == torch.float32
    assert cache[LOGITS].shape == (*TOKENS.shape, TINY.d_vocab)


@pytest.mark.parametrize("kind", REFERENCES)
@torch.no_grad()
def test_a_reference_has_weights_of_its_own(installed: str, kind: str):
    needs(kind, installed)
    model = random_model()
    reference = quietly(REFERENCES[kind], TINY, model.state_dict())
    before = reference.run(TOKENS)[LOGITS].clone()
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(reference.run(TOKENS)[LOGITS], before)


@torch.no_grad()
def test_bridge_aliases_name_keys_that_it_caches(installed: str):
    needs("bridge", installed)
    reference = quietly(REFERENCES["bridge"], TINY, random_model().state_dict())
    cache = reference.run(TOKENS)
    assert reference.aliases.keys() <= cache.keys() | {"hook_unembed"}
    # It masks with a number; ours, and HookedTransformer's, is infinity.
    assert (cache["blocks.0.attn.hook_attn_scores"] == -torch.inf).any()


@torch.no_grad()
def test_hugging_face_is_watched_without_leaving_hooks():
    pytest.importorskip("transformers")
    reference = quietly(REFERENCES["huggingface"], TINY, random_model().state_dict())
    reference.run(TOKENS)
    modules = reference_model(reference).modules()
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize(("version", "kind"), [("4.3.0", "bridge"), ("3.9.0", "hooked")])
def test_auto_goes_by_the_version_of_transformer_lens(monkeypatch, version: str, kind: str):
    monkeypatch.setattr(base, "version", lambda package: version)
    assert choose_reference("auto") == (kind, "")


def test_a_reference_is_chosen_by_name():
    assert {*REFERENCES} == {"bridge", "hooked", "huggingface"}
    assert [choose_reference(kind) for kind in REFERENCES] == [(kind, "") for kind in REFERENCES]
    assert choose_reference("none") == (None, "no reference was asked for")
    message = "no reference 'hugging'; choose from auto, none, bridge, hooked, huggingface"
    with pytest.raises(ValueError, match=message):
        choose_reference("hugging")


def test_a_file_in_the_folder_is_all_that_a_new_reference_takes(tmp_path: Path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from clean_transformer.parity.references.base import Implementation\n"
        "make = lambda *given: None\n"
        "IMPLEMENTATION = Implementation('mine', make, make, lambda: True, rank=0)\n"
    )
    monkeypatch.setattr(references, "__path__", [*references.__path__, str(tmp_path)])
    assert [each.name for each in implementations()] == ["mine", *REFERENCES]


def missing(monkeypatch, *packages: str) -> None:
    imported = base.import_module

    def fail(package: str):
        if package in packages:
            raise ModuleNotFoundError(package, name=package)
        return imported(package)

    def no_version(package: str):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(base, "import_module", fail)
    monkeypatch.setattr(base, "version", no_version)
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None if name in packages else name)


def test_without_transformer_lens_hugging_face_is_the_reference(monkeypatch):
    pytest.importorskip("transformers")
    missing(monkeypatch, "transformer_lens")
    assert choose_reference("auto") == ("huggingface", "")


def unavailable(message: str, build, *args) -> None:
    with pytest.raises(ReferenceUnavailable, match=message) as refusal:
        build(*args)
    assert "\n" not in str(refusal.value)


def test_without_any_package_every_reference_says_what_to_install(monkeypatch):
    missing(monkeypatch, "transformer_lens", "transformers")
    state = random_model().state_dict()
    none = (None, "no reference is installed; install the extra 'bridge'")
    assert choose_reference("auto") == none
    for kind, package, extra in [
        ("bridge", "transformer_lens", "bridge"),
        ("hooked", "transformer_lens", "hooked"),
        ("huggingface", "transformers", "bridge"),
    ]:
        message = f"^{package} is not installed; install the extra '{extra}'$"
        unavailable(message, REFERENCES[kind], TINY, state)


def test_the_other_version_of_transformer_lens_is_refused(installed: str):
    pytest.importorskip("transformer_lens")
    state = random_model().state_dict()
    if installed == "bridge":
        message = r"^transformer_lens 4.* has no HookedTransformer; install the extra 'hooked'"
        unavailable(message, REFERENCES["hooked"], TINY, state)
    else:
        message = r"^transformer_lens 3.* is not the TransformerBridge of 4\.x; install the extra"
        unavailable(message, REFERENCES["bridge"], TINY, state)


@pytest.mark.parametrize("kind", ["bridge", "huggingface"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_head": 5}, "needs n_heads × d_head = d_model"),
        ({"normalization_type": "LNPre", "tied_unembed": False}, "no place for folded LayerNorms"),
    ],
)
def test_a_model_that_hugging_face_cannot_hold_is_refused(installed, kind, changes, message):
    needs(kind, installed)
    cfg = tiny(**changes)
    message = f"^GPT2LMHeadModel cannot hold this model: .*{message}"
    unavailable(message, REFERENCES[kind], cfg, random_model(cfg).state_dict())
