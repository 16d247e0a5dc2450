"""The server: OpenAI's routes over the engine."""
