"""Blocks of transformers models on veneer's kernels, with hand-written backward: the fast path of training."""
