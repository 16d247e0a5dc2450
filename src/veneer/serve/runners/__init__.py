"""Runners compute a planned step: by the program, or by transformers' own code. The sampler draws."""
