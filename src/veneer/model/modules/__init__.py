"""Modules of a model by path, and the plan of an adapter on them."""
