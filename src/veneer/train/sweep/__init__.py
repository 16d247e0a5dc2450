"""Several training runs over one base, in one pass."""
