"""Records on a transformers model: only this package knows transformers' module layout."""
