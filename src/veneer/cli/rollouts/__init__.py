"""Verbs of answers that are drawn to learn from."""
