"""Supervised fine-tuning: recipes, data, the trainer, evaluation."""
