"""Attaching of records to a transformers model; only this package knows transformers' module layout."""
