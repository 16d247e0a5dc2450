"""GGUF files: read as models, and written; one table of keys a family serves both."""
