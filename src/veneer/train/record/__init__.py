"""Record of a run in its folder: its settings, its progress, and the lock on writing."""
