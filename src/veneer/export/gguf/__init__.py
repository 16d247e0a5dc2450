"""From a model and an adapter to a GGUF file: what llama.cpp, Ollama and LM Studio run."""
