"""Untrusted programs, such as chat templates and grammars, within limits of time and memory."""
