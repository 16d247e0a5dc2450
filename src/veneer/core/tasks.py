"""The tasks that an adapter may be trained for, in PEFT's words."""

from __future__ import annotations

from enum import StrEnum


class TaskType(StrEnum):
    """The task of a config. For the classifying ones the head is trained whole, beside the adapter."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
