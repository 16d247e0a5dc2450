"""Loads the model of a trainer if it is given by name, and attaches an adapter if a config is given."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.contract import MethodConfig
from veneer.errors import ConfigError
from veneer.model.adapted.experts import fit_experts
from veneer.store.stored_quantization import with_stored
from veneer.train.config import RunSettings

Kind = Literal["causal", "reward"]
"""A model that predicts tokens, or one that gives each sequence a score."""


def loaded(
    model: str | PreTrainedModel, args: RunSettings, quantization_config: Any, kind: Kind = "causal"
) -> PreTrainedModel:
    """Return the model. If it is a name, load it with ``args.model_init_kwargs``, which are then cleared.

    Raises ConfigError if loading settings are given for a model that is loaded already.
    """
    if not isinstance(model, str):
        if quantization_config is not None or args.model_init_kwargs:
            raise ConfigError(
                "quantization_config and model_init_kwargs say how to load a model, but the model is loaded already: "
                "give its name, or drop them"
            )
        return model
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    args.model_init_kwargs = None
    options = with_stored(model, options)
    if kind == "reward":
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **options)
    return AutoModelForCausalLM.from_pretrained(model, **options)


def adapted(model: PreTrainedModel, peft_config: MethodConfig | None) -> PreTrainedModel:
    """Attach a fresh adapter of ``peft_config``, if that is given, and return the model.

    If the model has experts, choose their implementation by their widths. Raises ConfigError for a config of another
    library, and for a model that already has an adapter.
    """
    fit_experts(model)
    if peft_config is None:
        return model
    if not isinstance(peft_config, MethodConfig):
        raise ConfigError(
            f"peft_config must be one of veneer's configs, such as veneer.LoraConfig, not "
            f"{type(peft_config).__module__}.{type(peft_config).__name__}"
        )
    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model has an adapter already and peft_config asks for another: merge_and_unload() the first, or train "
            "it by leaving peft_config out"
        )
    return get_peft_model(model, peft_config)
