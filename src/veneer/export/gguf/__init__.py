"""Export of models and adapters to GGUF files, for llama.cpp, Ollama and LM Studio."""
