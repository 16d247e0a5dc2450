"""Server: OpenAI's routes over the engine."""
