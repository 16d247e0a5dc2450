"""Adapters of a server: versions of their files, loading, packed blocks of memory, mixtures."""
