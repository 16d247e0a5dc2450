"""Batches whose rows differ: mixed adapters, adapters that act from some token on, sequences, and pages of a cache."""
