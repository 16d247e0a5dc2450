"""Direct preference optimization, on TRL's trainer."""

from __future__ import annotations

import trl

from veneer.train.preference.config import DPOConfig
from veneer.train.preference.referred import ReferredTrainer


class DPOTrainer(ReferredTrainer, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's ``DPOTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    Rows hold prompt, chosen and rejected. The first loss is ln 2 and the first rewards are 0, because the model starts
    equal to its reference (see `ReferredTrainer`). Log-probabilities are computed from hidden states, in chunks.
    Checkpoints, resume and optimizers are those of `veneer.SFTTrainer`.
    Rafailov et al. 2023, arXiv:2305.18290. Raises ConfigError, DataError or TrainingError if the run is impossible as
    configured.
    """

    task = "dpo"
    settings = DPOConfig
