"""Merged checkpoints: adapters merged into their base, shard by shard."""
