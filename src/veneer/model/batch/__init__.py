"""Batches with more structure than rows: mixed adapters, invocations, sequences, pages."""
