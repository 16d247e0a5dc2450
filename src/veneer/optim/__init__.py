"""Optimizers for adapters: 8-bit and paged state, low-rank gradients, learning-rate groups."""
