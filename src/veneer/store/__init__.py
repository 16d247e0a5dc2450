"""Adapters, base checkpoints and model sources on disk."""
