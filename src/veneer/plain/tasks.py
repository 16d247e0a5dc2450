"""Tasks that an adapter may be trained for, in PEFT's terms."""

from __future__ import annotations

from enum import StrEnum


class TaskType(StrEnum):
    """Task of a config. Classification tasks also train the whole head and save it with the adapter."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
