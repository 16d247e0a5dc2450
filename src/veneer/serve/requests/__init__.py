"""Requests from text to tokens and back: checks, admission, templates, forms, answers."""
