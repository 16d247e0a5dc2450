"""Weights that are sharded over processes, and their gathering, or conversion to dense ones."""
