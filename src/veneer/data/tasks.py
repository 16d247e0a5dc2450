"""Tasks of recipes by the rows that they need."""

from __future__ import annotations

OF_REWARDS = ("grpo", "rloo", "best_of")
"""Tasks whose rows are prompts, to which the model's own answers are rewarded."""
