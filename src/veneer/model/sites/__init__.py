"""Places of adapters on a model, one file a kind: layers, prefixes, prompts, bottlenecks."""
