"""Target matching: PEFT is the oracle over lists, regexes, exclusions and layer indices; messages name what is near."""

import string
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from veneer.contract import TargetedConfig
from veneer.contract.targets import ModuleIndex, absent_layers, present_targets, select_targets
from veneer.errors import ConfigError, TargetError
from veneer.plain.nearest import nearest

LEAVES = ("q_proj", "v_proj", "up_proj", "xq_proj")
BLOCKS = ("attn", "mlp", "experts.1")
LAYER_NAMES = [
    f"{root}.{layer}.{block}.{leaf}"
    for root in ("model.layers", "model.vision.h")
    for layer in (0, 1, 11)
    for block in BLOCKS
    for leaf in LEAVES
]
NAMES = (*LAYER_NAMES, "model.lm_head", "q_proj")
THERE = "they lie in layers.0 to layers.11, h.0 to h.11"
INDEX = ModuleIndex(all_names=NAMES, adaptable=NAMES, all_linear=NAMES[:-2])


@dataclass(frozen=True, kw_only=True)
class Config(TargetedConfig):
    """A bare config, so that nothing but matching is at work."""

    shapes = init = lower = places_in = None  # no method


SUFFIXES = st.sampled_from([*LEAVES, "attn.q_proj", "1.mlp.up_proj", "lm_head", NAMES[0], NAMES[-3], "model.lm_head"])
REGEXES = st.sampled_from(
    [r".*q_proj", r"model\.layers\.\d\..*", r".*\.(attn|mlp)\.v_proj", r"q_proj", r".*1.*up_proj"]
)
INDICES = st.one_of(st.sampled_from([0, 1, 11]), st.lists(st.sampled_from([0, 1, 11]), min_size=1, unique=True))


@st.composite
def settings(draw):
    """Keyword arguments that both configs take. PEFT allows layer indices only beside a list."""
    targets = draw(st.one_of(st.lists(SUFFIXES, min_size=1, unique=True), REGEXES))
    chosen = {"target_modules": targets}
    chosen["exclude_modules"] = draw(st.one_of(st.none(), st.lists(SUFFIXES, min_size=1, max_size=2), REGEXES))
    chosen["modules_to_save"] = draw(st.one_of(st.none(), st.sampled_from([["lm_head"], ["mlp"], ["model.vision"]])))
    if isinstance(targets, list) and draw(st.booleans()):
        chosen["layers_to_transform"] = draw(INDICES)
        chosen["layers_pattern"] = draw(st.sampled_from([None, "layers", "h", ["h", "layers"], "experts"]))
    return chosen


def by_peft(chosen: dict) -> tuple[str, ...]:
    config = PeftLoraConfig(**chosen)
    return tuple(name for name in NAMES if check_target_module_exists(config, name))


@given(settings())
def test_selects_what_peft_selects(chosen):
    expected = by_peft(chosen)
    if expected:
        assert select_targets(Config(**chosen), INDEX) == expected
    else:
        with pytest.raises(TargetError):
            select_targets(Config(**chosen), INDEX)


def test_the_first_index_on_the_path_is_the_layers_even_at_the_root():
    """Departs from PEFT, which looks for a dot before the list's name and takes the expert's index here."""
    names = ("h.0.experts.1.w", "h.1.experts.0.w")
    index = ModuleIndex(all_names=names, adaptable=names, all_linear=names)
    assert select_targets(Config(target_modules=["w"], layers_to_transform=0), index) == names[:1]


@pytest.mark.parametrize(
    ("layers", "pattern", "said"),
    [
        ([0, 11], None, []),
        ([], None, []),
        (None, None, []),
        ([0, 99, -1], None, ["layers_to_transform holds [-1, 99], but the model has no such layers: " + THERE]),
        (7, "h", ["layers_to_transform holds [7], but the model has no such layers: " + THERE]),
        ([0, 2], "experts", ["layers_to_transform holds [0, 2], but the model has no such layers: " + THERE]),
    ],
)
def test_layers_that_the_model_does_not_have_are_named(layers, pattern, said):
    config = Config(target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern if layers else None)
    assert absent_layers(config, INDEX) == said


def test_layers_without_a_target_are_no_error():
    """Such as the dense layers before those with experts."""
    names = ("h.0.mlp", "h.1.experts.w", "h.2.experts.w")
    index = ModuleIndex(all_names=names, adaptable=names, all_linear=names)
    assert absent_layers(Config(target_modules=["w"], layers_to_transform=[0, 1]), index) == []
    assert "they lie in h.0 to h.2" in absent_layers(Config(layers_to_transform=3), index)[0]


def test_no_layer_indices_are_no_restriction():
    assert select_targets(Config(target_modules=["lm_head"], layers_to_transform=[]), INDEX) == ("model.lm_head",)


@pytest.mark.parametrize("spelling", ["all-linear", "All-Linear"])
def test_all_linear_is_what_the_index_says_less_exclusions(spelling):
    chosen = select_targets(Config(target_modules=spelling, exclude_modules=["v_proj"]), INDEX)
    assert chosen == tuple(n for n in NAMES[:-2] if not n.endswith(".v_proj"))


def test_a_regex_takes_the_adaptable_modules_that_it_meets():
    index = ModuleIndex(all_names=("m.attn", "m.attn.q"), adaptable=("m.attn.q",), all_linear=())
    assert select_targets(Config(target_modules=r"m\.attn.*"), index) == ("m.attn.q",)


def test_of_the_default_names_those_that_the_model_has_are_taken():
    assert present_targets(Config(), INDEX, ("c_attn", "lm_head")) == ("lm_head",)


def test_where_the_model_has_none_of_them_the_error_says_what_it_has():
    with pytest.raises(TargetError, match=r"Config has no default target_modules .* \['c_attn'\].*up_proj"):
        present_targets(Config(), INDEX, ("c_attn",))


@given(st.text(string.ascii_lowercase, min_size=4, max_size=12).filter(lambda s: s not in "model layers attn vision"))
def test_an_unknown_name_is_an_error_that_repeats_it(name):
    with pytest.raises(TargetError, match=f"target module '{name}' matches no module"):
        select_targets(Config(target_modules=[name, "q_proj"]), INDEX)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"target_modules": ["qproj", "v_proj", "upproj"]}, ["'qproj'", "nearest: q_proj", "'upproj'", "up_proj"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["vproj"]}, ["excluded module 'vproj'", "v_proj"]),
        ({"target_modules": ["zzz"], "exclude_modules": ["yyy"]}, ["'zzz'", "'yyy'"]),
        ({"target_modules": r".*\.k_proj"}, [r"'.*\\.k_proj' matches no module", "nearest: v_proj, q_proj"]),
        ({"target_modules": "up_proj"}, ["nearest: model.layers.", "for whole paths: names go into a list"]),
        (
            {"target_modules": ["layers.7.attn.up_proj"]},
            ["'layers.7.attn.up_proj' matches no", "layers.1.attn.up_proj"],
        ),
        ({"target_modules": ["zzz"]}, ["of the model. Linear layers of this model end with: lm_head, q_proj"]),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            ["leave nothing", "exclude_modules=['q_proj']"],
        ),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, ["leave nothing", "modules_to_save"]),
        ({"target_modules": ["v_proj"], "layers_to_transform": 7}, ["layers_to_transform=7", "no layer of the"]),
        ({"target_modules": ["v_proj"], "layers_to_transform": 7}, ["they lie in layers.0 to layers.11, h.0 to h.11"]),
        ({"target_modules": []}, ["target_modules is empty", "q_proj"]),
    ],
)
def test_messages_say_everything_that_is_wrong(chosen, words):
    with pytest.raises(TargetError) as caught:
        select_targets(Config(**chosen), INDEX)
    for word in words:
        assert word in str(caught.value)


def test_a_name_that_only_meets_other_modules_says_what_can_be_adapted():
    index = ModuleIndex(all_names=("m.norm", "m.q"), adaptable=("m.q",), all_linear=("m.q",))
    with pytest.raises(TargetError, match=r"only modules that cannot be adapted, such as 'm.norm'.*end with: q"):
        select_targets(Config(target_modules=["norm", "q"]), index)


def test_only_what_can_be_adapted_is_offered_as_a_target():
    index = ModuleIndex(all_names=("m.act_fn", "m.c_fc"), adaptable=("m.c_fc",), all_linear=("m.c_fc",))
    with pytest.raises(TargetError, match=r"'act_fc' matches no module of the model \(nearest: c_fc\)$"):
        select_targets(Config(target_modules=["act_fc"]), index)


def test_layers_of_modules_that_lie_in_no_list_are_told_so():
    index = ModuleIndex(all_names=("m.q",), adaptable=("m.q",), all_linear=())
    with pytest.raises(TargetError, match="they lie in no list of layers"):
        select_targets(Config(target_modules=["q"], layers_to_transform=0), index)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"target_modules": "q_(proj"}, "target_modules='q_(proj' is not a regular expression"),
        ({"target_modules": "q", "exclude_modules": "*"}, "exclude_modules='*' is not a regular expression"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern is given without layers_to_transform"),
    ],
)
def test_a_config_checks_its_patterns(chosen, words):
    with pytest.raises(ConfigError) as caught:
        Config(**chosen)
    assert words in str(caught.value)


def test_a_config_holds_copies_of_what_it_was_given():
    given_names = ["q_proj"]
    config = Config(target_modules=given_names, exclude_modules={"b", "a"})
    given_names.append("v_proj")
    assert config.target_modules == ("q_proj",)
    assert config.exclude_modules == ("a", "b")


def test_nearest_is_empty_where_nothing_is_near():
    assert nearest("zzzzzz", ["q_proj"]) == []
