from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.config import Config
from clean_transformer.weights.formats.transformer_lens import HOOKED_TRANSFORMER
from clean_transformer.weights.infer import infer_config
from clean_transformer.weights.load import FORMATS
from clean_transformer.weights.refusals import WeightsError, refuse_differences
from clean_transformer.weights.rows import Row
from clean_transformer.weights.shapes import parameter_shapes
from clean_transformer.weights.table import Format, detect

from ..helpers import assert_equal_states, configs, random_model, random_state, tiny

EVERY_FORMAT = pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
# OpenAI's format is not one of them: it has no separate unembedding.
UNTIED_FORMATS = [
    known for known in FORMATS if any(row.ours == "unembed.W_U" for row in known.outer)
]
MERGED_HEADS = [known for known in UNTIED_FORMATS if known is not HOOKED_TRANSFORMER]
EVERY_UNTIED_FORMAT = pytest.mark.parametrize("known", UNTIED_FORMATS, ids=lambda known: known.name)


def held_by(known: Format, cfg: Config) -> Config:
    """The architecture, tied if the format can only hold a tied one."""
    return cfg if known in UNTIED_FORMATS else replace(cfg, tied_unembed=True)


@EVERY_FORMAT
@given(cfg=configs())
def test_writing_and_reading_keep_every_bit(known: Format, cfg: Config):
    cfg = held_by(known, cfg)
    state = random_state(known, cfg)
    theirs = known.write(cfg, state)
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    assert_equal_states(known.read(cfg, theirs), state)


@EVERY_FORMAT
@given(cfg=configs())
def test_reading_gives_views(known: Format, cfg: Config):
    cfg = held_by(known, cfg)
    theirs = known.write(cfg, random_state(known, cfg))
    owned = {tensor.untyped_storage().data_ptr() for tensor in theirs.values()}
    read = known.read(cfg, theirs)
    for row in known.rows(cfg):
        if row.theirs is not None:
            assert read[row.ours].untyped_storage().data_ptr() in owned


@EVERY_FORMAT
def test_every_parameter_has_a_row_in_every_layer(known: Format):
    for cfg in (tiny(), held_by(known, tiny(tied_unembed=False))):
        assert {row.ours for row in known.rows(cfg)} == set(parameter_shapes(cfg))


@EVERY_UNTIED_FORMAT
def test_folded_layer_norms_have_no_rows(known: Format):
    cfg = tiny(normalization_type="LNPre", tied_unembed=False)
    assert [row.ours for row in known.rows(cfg) if "ln" in row.ours] == []
    state = random_state(known, cfg)
    assert_equal_states(known.read(cfg, known.write(cfg, state)), state)


def zeros(cfg: Config) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in parameter_shapes(cfg).items()}


# A format whose rows use every feature of `Row`.
BOXES = Format(
    name="boxes",
    marker="word.table",
    outer=(
        Row("embed.W_E", "word.table"),
        Row("pos_embed.W_pos", "place.table", "d_model n_ctx -> n_ctx d_model"),
        Row("ln_final.w", "scale"),
        Row("ln_final.b", "shift"),
        Row("unembed.W_U", "out", "d_vocab d_model -> d_model d_vocab"),
        Row("unembed.b_U", None),
    ),
    block=(
        *(Row(f"{ln}.{letter}", f"{ln}{letter}") for ln in ("ln1", "ln2") for letter in "wb"),
        *(
            Row(
                f"attn.W_{letter}",
                "qkv",
                "(qkv head d_head) d_model -> qkv head d_model d_head",
                part,
            )
            for part, letter in enumerate("QKV")
        ),
        *(Row(f"attn.b_{letter}", f"bias{letter}") for letter in "QKVO"),
        Row("attn.W_O", "o"),
        *(Row(f"mlp.{name}", name) for name in ("W_in", "b_in", "W_out", "b_out")),
    ),
    block_prefix="box.{layer}/",
    buffers=r"box\.\d+/cache",
)
CFG = tiny(tied_unembed=False)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_model(CFG).state_dict()


@pytest.fixture
def boxes(state) -> dict[str, torch.Tensor]:
    return BOXES.write(CFG, state)


def test_patterns_and_parts_place_every_value(state, boxes):
    assert torch.equal(boxes["place.table"], state["pos_embed.W_pos"].T)
    assert torch.equal(boxes["out"], state["unembed.W_U"].T)
    merged = boxes["box.1/qkv"].unflatten(0, (3, CFG.n_heads, CFG.d_head))
    for part, letter in enumerate("QKV"):
        for head in range(CFG.n_heads):
            assert torch.equal(merged[part, head].T, state[f"blocks.1.attn.W_{letter}"][head])


def test_every_difference_is_named_in_one_error(boxes):
    del boxes["box.0/o"], boxes["scale"]
    boxes["box.2/o"] = boxes["extra"] = torch.ones(1)
    boxes["box.1/qkv"] = boxes["box.1/qkv"].T
    boxes["word.table"] = boxes["word.table"][1:]
    with pytest.raises(WeightsError) as refusal:
        BOXES.read(CFG, boxes)
    assert str(refusal.value) == (
        "this is not a complete boxes state dict; "
        "missing: scale, box.0/o; "
        "unused: box.2/o, extra; "
        "of the wrong shape: word.table (30, 12) instead of (31, 12), "
        "box.1/qkv (12, 36) instead of (36, 12)"
    )


def test_buffers_are_passed_over_by_their_whole_name(boxes, state):
    boxes["box.7/cache"] = torch.ones(1)
    assert_equal_states(BOXES.read(CFG, boxes), state)
    boxes["box.7/cache_of_something"] = torch.ones(1)
    with pytest.raises(WeightsError, match=r"unused: box\.7/cache_of_something$"):
        BOXES.read(CFG, boxes)


def test_a_parameter_without_a_place_is_zero_or_refused(boxes, state):
    assert not BOXES.read(CFG, boxes)["unembed.b_U"].any()
    state["unembed.b_U"][3] = 1e-30
    with pytest.raises(WeightsError, match=r"boxes format has no place for unembed\.b_U, which is"):
        BOXES.write(CFG, state)


def test_a_tied_unembedding_may_be_repeated_but_not_be_another(boxes):
    tied = tiny(tied_unembed=True)
    boxes["out"] = boxes["word.table"].clone()
    assert "unembed.W_U" not in BOXES.read(tied, boxes)
    boxes["out"][0, 0] += 1
    with pytest.raises(
        WeightsError, match="uses the embedding as the unembedding; set tied_unembed"
    ):
        BOXES.read(tied, boxes)


def test_a_parameter_without_a_row_is_refused(boxes, state):
    without = replace(BOXES, outer=tuple(row for row in BOXES.outer if row.ours != "unembed.W_U"))
    for refuse in (lambda: without.read(CFG, boxes), lambda: without.write(CFG, state)):
        with pytest.raises(WeightsError, match=r"the boxes format has no place for unembed\.W_U$"):
            refuse()


@given(st.dictionaries(st.text("ab", min_size=1), st.tuples(st.integers(1, 3))))
def test_equal_shapes_are_not_refused(shapes: dict[str, tuple[int, ...]]):
    refuse_differences("problem", shapes, dict(shapes))


def test_detection_by_marker():
    assert detect([*FORMATS, BOXES], {"x": torch.ones(1), "word.table": torch.ones(1)}) is BOXES
    names = ", ".join(known.name for known in FORMATS)
    message = rf"none of the known formats \({names}\); its first keys are \['a', 'b', 'c'\]"
    with pytest.raises(WeightsError, match=message):
        detect(FORMATS, dict.fromkeys("abcd", torch.ones(1)))


def test_a_state_dict_that_fits_several_formats_is_refused():
    both = {"word.table": torch.ones(1), "embed.W_E": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"several known formats \(HookedTransformer, boxes\)"):
        detect([*FORMATS, BOXES], both)


@EVERY_FORMAT
def test_markers_tell_the_formats_apart(known: Format):
    cfg = held_by(known, CFG)
    theirs = known.write(cfg, random_state(known, cfg))
    assert detect(FORMATS, theirs) is detect(FORMATS[::-1], theirs) is known


# The architecture, inferred from the shapes.


@pytest.mark.parametrize("normalization_type", ["LN", "LNPre"])
@pytest.mark.parametrize("known", MERGED_HEADS, ids=lambda known: known.name)
def test_merged_heads_are_told_by_a_published_width_only(known: Format, normalization_type: str):
    changes = {"tied_unembed": False, "normalization_type": normalization_type}
    sizes = {"d_vocab": 5, "n_ctx": 3, "d_mlp": 7, "n_layers": 2}
    medium = Config.gpt2("medium", **sizes, **changes)
    theirs = known.write(medium, zeros(medium))
    (unembedding,) = (row.theirs for row in known.rows(medium) if row.ours == "unembed.W_U")
    theirs[unembedding] += 1
    with pytest.warns(UserWarning, match="assuming 16 heads, .* d_model 1024, and eps 1e-5"):
        assert infer_config(known, theirs) == medium

    message = "do not show the number of heads, and no published GPT-2 has d_model 12; pass cfg"
    with pytest.raises(WeightsError, match=message):
        infer_config(known, known.write(tiny(**changes), zeros(tiny(**changes))))


@EVERY_FORMAT
def test_a_state_dict_without_blocks_tells_nothing(known: Format):
    with pytest.raises(WeightsError, match=f"this {known.name} state dict has no blocks"):
        infer_config(known, {known.marker: torch.ones(2, 768)})


@pytest.mark.filterwarnings("ignore:.*state dict .*assuming")
@EVERY_FORMAT
def test_what_the_missing_tensors_would_tell_is_named(known: Format):
    small = Config.gpt2("small", n_layers=1, d_vocab=5, n_ctx=3)
    theirs = known.write(small, zeros(small))
    kept = {
        key: tensor
        for key, tensor in theirs.items()
        if not any(part in key for part in ("pos", "wpe", "mlp", "ffn_up", "ffn_down"))
    }
    with pytest.raises(
        WeightsError, match=r"lacks the tensors whose shapes show \['d_mlp', 'n_ctx'\]"
    ):
        infer_config(known, kept)
