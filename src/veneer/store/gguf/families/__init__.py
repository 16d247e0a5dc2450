"""Families of models, one to a module, found by the module's name."""
