"""Attaching records to a transformers model: everything that knows transformers' module layout."""
