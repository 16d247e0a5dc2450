"""Tensors only: the records, their application and folding, the contracts of methods, and target matching."""
