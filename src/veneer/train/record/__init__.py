"""Record of a run in its folder: its settings and progress, and the check that no other process writes there."""
