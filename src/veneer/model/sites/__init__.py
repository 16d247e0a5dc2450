"""Where adapters act in a model, one file for each kind: layers, prefixes, prompts, bottlenecks."""
