"""Training: supervised fine-tuning, preference and rewards, sweeps, resume."""
