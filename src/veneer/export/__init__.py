"""Merged checkpoints: adapters folded into their base, shard by shard."""
