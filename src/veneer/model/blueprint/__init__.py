"""Description of a decoder: its parts by role, read from a config and from the names and shapes of modules."""
