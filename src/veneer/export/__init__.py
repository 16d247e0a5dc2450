"""Files for other programs: checkpoints with adapters merged in, GGUF files, and adapters as plain LoRA."""
