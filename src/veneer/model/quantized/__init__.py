"""Modules whose frozen weights stay in codes: linear layers, embeddings, stacks of experts."""
