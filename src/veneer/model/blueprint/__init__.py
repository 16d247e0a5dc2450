"""One description of a decoder: its parts by role, made from a config and the names and shapes of its modules."""
