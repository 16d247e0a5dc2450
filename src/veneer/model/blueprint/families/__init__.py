"""One file for each family (or kind of families) whose description is tested by values; each holds a `FAMILY`."""
