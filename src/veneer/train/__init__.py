"""Supervised fine-tuning: the trainer, recipes, sweeps."""
