"""What lies on disk: adapters, base checkpoints, model sources, the model cache."""
