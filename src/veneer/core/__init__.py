"""Tensors only: the records, their application and folding, the contracts that methods obey, and target matching."""
