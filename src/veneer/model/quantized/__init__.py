"""Modules whose frozen weights stay quantized: linear layers, embeddings, stacks of experts."""
