"""Places in a model at which adapters act, one file for each kind: layers, prefixes, prompts, bottlenecks."""
