"""One family a file, found by its name."""
