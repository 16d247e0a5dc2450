"""Serving: many adapters of every method in one continuous batch over one base."""
