"""Modules with adapters, changed in place, and the state that they share."""
