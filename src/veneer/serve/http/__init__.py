"""Server: routes of OpenAI's and Anthropic's clients, keys, metrics, and adapters that come and go."""
