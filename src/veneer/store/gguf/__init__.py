"""GGUF files, read as models and written. One table of keys for each family serves both."""
