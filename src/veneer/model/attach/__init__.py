"""Attaching of adapters to a model, and its preparation."""
