"""Weights that are cut over processes, and made whole or dense again."""
