"""Adapters' updates applied to a transformers model. Only this package knows transformers' module layout."""
