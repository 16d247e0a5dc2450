"""Departures from PEFT on purpose, as PEFT's tests show them: each with its reason and the text of its failure."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """A departure: its name, its reason, and patterns of the tests' names, of their failures and of the failing lines.

    ``at`` is searched in a line of PEFT's tests, "testing_common.py:142 check_modelcard": a fault that fails elsewhere
    is none of the departure.
    """

    what: str
    reason: str
    tests: str = ""
    says: str = ""
    at: str = ""


LEFT_OUT = Departure(
    "methods left out: Shadow, X-LoRA, Megatron's layers",
    "Shadow is a network of its own; X-LoRA's needs two passes for each token, and Arrow mixes by token in one",
    says=r"ShadowConfig|ShadowPEFT|XLORA|XLora|megatron",
)
DEPARTURES = (
    LEFT_OUT,
    Departure(
        "`safe_serialization=False`",
        "a pickle runs the code that it holds, so adapters are written as safetensors alone",
        says="safe_serialization=False asks for a pickle",
        at=r"_test_save_pretrained|test_save_pretrained_regression",
    ),
    Departure(
        "configs that are changed in place",
        "configs are frozen and were checked when they were made: another is made with `dataclasses.replace`, and "
        "attaching keeps a copy",
        says=r"FrozenConfigError|unexpected keyword argument 'peft_type'|isinstance\(.*, set\)",
    ),
    Departure(
        "`from_pretrained(config=…)` that attaches the very object",
        "the same: `inference_mode` of the caller's object stays as it was",
        tests="test_from_pretrained_config_construction",
        says="^AssertionError: $",
        at=r"testing_common.py:491 ",
    ),
    Departure(
        "`FullyShardedDataParallel` around an adapted model",
        "`shard_base` cuts the frozen weights, and adapters stay whole on every process",
        tests="fsdp_wrapped",
        says="FullyShardedDataParallel has no adapter|^AttributeError: property 'weight' of .* has no setter",
        at=r"test_custom_models.py:(8147|8153) ",
    ),
    Departure(
        "the words of an error",
        "an error of the same kind is raised: it says what was given, what is allowed and what to do",
        says=r"^AssertionError: Regex pattern did not match.*Actual message: ['\"](no adapter is named"
        r"|adapter '\w+' is merged:|adapters \[.*\] each have their own|merging \[.*\] gives NaN"
        r"|\w+Config: (task_type|cayley_neumann_eps|sparsity)="
        r"|adapter_names holds \d+ names for|block_size=3 at lin1 does not divide|step\(\) has a closure"
        r"|target_parameters names 'param', which is no)",
    ),
    Departure(
        "a warning about what has no effect",
        "nothing is said where nothing is wrong, and an error is raised where something is",
        says=r"DID NOT WARN|where \[\] = WarningsRecorder",
        at=r"testing_common.py:848 |test_initialization.py:(1141|1804|6164) ",
    ),
    Departure(
        "settings that match no module",
        "a key of a pattern, or a tie, that means nothing is an error when the adapter is attached; PEFT may warn",
        says=r"_pattern key '.*' matches none of the|no module shares the weight of the input embeddings",
    ),
    Departure(
        "unknown keys in `adapter_config.json`",
        "each is an error that names the nearest one: a key that is not understood changes the adapter's meaning",
        says=r"FormatError: .*adapter_config\.json: (\d+ problems\s+)?(unknown key|peft_type=None)",
        at=r"test_config.py:(485|505|516|539) ",
    ),
    Departure(
        "several adapters with trained biases",
        "each adapter has its own copies of biases, so that there is nothing to refuse",
        tests="test_adding_multiple_adapters_with_bias_raises",
        says="DID NOT RAISE|has no attribute 'peft_config'",
        at=r"testing_common.py:(1952|1961) ",
    ),
    Departure(
        "an error that is not needed",
        "prompts unload, `generate` takes positional arguments, prefixes train with checkpointing, adapters with VeRA "
        "have projections of their own, `lora_bias` goes with every start, and sums are of whole updates of any ranks",
        tests=r"test_unload_adapter|test_generate_pos_args|different_prng_raises|mixing_save_projection_raises"
        r"|lora_with_bias_incompatible_arguments|test_weighted_combination_of_adapters"
        r"|test_prompt_learning_with_gradient_checkpointing\[PrefixTuning",
        says="DID NOT RAISE|^ConnectionError: .*english_quotes",  # the error would have come before the data
        at=r"testing_common.py:(1101|1593|1711) |test_initialization.py:(1563|2113) |test_vera.py:106 "
        r"|testing_utils.py:286 ",
    ),
    Departure(
        "parameters on the meta device",
        "`low_cpu_mem_usage` has no effect: parameters are made once, on the device of their layer",
        tests="test_load_model_low_cpu_mem_usage",
        says="PEFT_TYPE_TO_TUNER_MAPPING",
        at=r"testing_common.py:295 ",
    ),
    Departure(
        "adapters that train the same row of a table, active together",
        "neither row is the sum of both: PEFT takes the last one's",
        says=r"each train row \d+ of",
    ),
    Departure(
        "a prefix on a model without a cache of keys and values",
        "it is refused when it is attached, and not in the first forward pass",
        says="is not a decoder with a cache of keys and values",
    ),
    Departure(
        "AdaLoRA's pull towards orthogonality in the loss of an evaluation",
        "that loss is the model's; the pull is part of training",
        tests=r"test_forward_with_labels\[AdaLora",
        says="^AssertionError",
        at=r"test_seq_classifier.py:505 ",
    ),
    Departure(
        "an adapter that trains while it is inactive",
        "a loaded adapter trains while it is active, and is frozen otherwise, so that no optimizer holds it",
        tests="requires_grad_set_correctly",
        says=r"^AssertionError: assert False",
        at=r"test_custom_models.py:(7233|7316|7349) ",
    ),
    Departure(
        "modules that keep their own attributes",
        "a module stays of its class, changed in place: one without `in_features` gets none",
        tests="test_in_features_out_features_exposed",
        says="hasattr",
        at=r"test_custom_models.py:2787 ",
    ),
    Departure(
        "layers of one model switched one by one",
        "all layers read one state, so that no layer is on while another is off",
        tests="test_disable_adapters_exiting_context_irregular_state",
        says="enable_adapters",
        at=r"test_custom_models.py:3881 ",
    ),
    Departure(
        "a model card without the base of a model that is not of transformers",
        "the card names the base that the config names",
        tests=r"test_custom_models.*::test_save_pretrained(_selected_adapters)?\[",
        says="^AssertionError: $",
        at=r"testing_common.py:142 check_modelcard",
    ),
    Departure(
        "a field without effect: OSF's `target_svd_config`",
        "PEFT takes it and reads it nowhere; files that hold it are read",
        says=r"unexpected keyword argument 'target_svd_config'",
    ),
    Departure(
        "`num_virtual_tokens` left out",
        "it must be given: PEFT makes a config that no model can take",
        says="missing # required|missing 1 required keyword-only argument: 'num_virtual_tokens'",
        at=r"test_config.py:505 ",
    ),
    Departure(
        "PEFT's wrappers around the model and its modules, and the names of parameters that follow from them",
        "veneer puts no wrapper around modules: `base_model`, `token_adapter` and the like are not there",
        says=r"has no attribute '(model|prompt_encoder|token_adapter|peft_config|set_adapter|base_layer)'"
        r"|where 'default' = |^(?!FormatError).*base_model\.model\.|isinstance\(Adapted|isinstance\([A-Z]\w+\(",
    ),
    Departure(
        "the names of modules and of parameters that are trained, as their paths in the model",
        "they follow from PEFT's wrappers: no module has `model.` in front, and magnitudes are parameters",
        tests=r"test_layer_names_large|test_dora_save_and_load_remapping"
        r"|TestLowLevelFunctional::test_inject_adapter_in_model",
        says=r"^AssertionError",
        at=r"test_custom_models.py:4822 |test_low_level_api.py:94 |test_tuners_utils.py:763 ",
    ),
    Departure(
        "`preprocess_loraga`, `preprocess_corda`",
        "starts from data are made on the adapted model, with `initialize_lora_ga_weights` and the like",
        says=r"^absent: '?preprocess_|unexpected keyword argument 'cache_file'",
    ),
    Departure(
        "PEFT's inner functions, tables and layer classes",
        "they are no interface: veneer has other parts",
        says=r"^absent: '?(\w*Layer|BufferDict|IncrementalPCA|DoraCaching|MontecloraSampler|_\w+|check_target\w+"
        r"|INCLUDE_LINEAR\w+|\w+_MAPPING|[\w.]+cache_clear)"
        r"|absent\.\w+'> has no attribute|_get_module_names|no deleter",
    ),
)


def departure_of(name: str, failure: str, line: str) -> Departure | None:
    """The departure that explains a test's failure ("class: message") at a line; None if none does."""
    matches = (
        d
        for d in DEPARTURES
        if re.search(d.tests, name) and re.search(d.says, failure, re.DOTALL) and re.search(d.at, line)
    )
    return next(matches, None)
