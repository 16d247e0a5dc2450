"""Trainers that learn from answers drawn by the model in training."""
