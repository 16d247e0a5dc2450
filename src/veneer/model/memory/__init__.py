"""Memory of a model that trains or serves: the heap, offload, checkpointing, what is available."""
