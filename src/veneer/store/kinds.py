"""Kinds of model by their config: those that predict the next token, with or without images, and the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from veneer.errors import ConfigError

_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


_ENCODES = "an encoder with a decoder"


def auto_class(source: str | os.PathLike[str], facts: Mapping[str, Any], *, encodes: bool = False) -> Any:
    """Return transformers' auto class for a model that predicts the next token, by the fields of its config.

    ``encodes``: an encoder with a decoder is accepted too.

    A model of images and text is loaded whole; text runs through its text half. Raises ConfigError for another kind of
    model: a classifier, an encoder, an encoder with a decoder.
    """
    named = str((facts.get("architectures") or [""])[0])
    model_type = str(facts.get("model_type", ""))
    other = _other_kind(model_type, named, is_decoder=bool(facts.get("is_decoder")))
    if encodes and other == _ENCODES:
        return AutoModelForSeq2SeqLM
    if other is not None:
        told = named or model_type or "it names no model_type"
        raise ConfigError(
            f"{os.fspath(source)} is {other} ({told}): models that predict the next token are trained, planned and "
            "served here, those with images too; encoders with a decoder are served, and planned with --serve. "
            "Give one of them; adapters attach to every other in Python (get_peft_model)"
        )
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def _other_kind(model_type: str, named: str, *, is_decoder: bool) -> str | None:
    """Return in words the kind of a model that does not predict the next token ("an encoder"). Return None for a model
    that does, or whose type is unknown.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if named.endswith(_HEADS):
        return "a model with a head of classes"
    if model_type in causal and (named in causal.values() or is_decoder):
        return None
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return _ENCODES
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    if model_type in causal or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or not model_type:
        return None
    return "of no kind that predicts the next token"
