"""Kahneman-Tversky optimization, on TRL's trainer."""

from __future__ import annotations

import trl

from veneer.train.preference.config import KTOConfig
from veneer.train.preference.referred import ReferredTrainer


class KTOTrainer(ReferredTrainer, trl.KTOTrainer):  # type: ignore[misc]
    """TRL's ``KTOTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    Rows hold prompt, completion and label, which is true if the completion is wanted. The reference, log-probabilities
    and checkpoints are those of `veneer.DPOTrainer`.
    Ethayarajh et al. 2024, arXiv:2402.01306. Raises ConfigError, DataError or TrainingError if the run is impossible as
    configured.
    """

    task = "kto"
    settings = KTOConfig
