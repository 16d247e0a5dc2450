"""Trainers that learn from answers which the model in training draws."""
