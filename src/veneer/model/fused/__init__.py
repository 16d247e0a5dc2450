"""Fast training: blocks of transformers models run on veneer's kernels, with hand-written backward passes."""
