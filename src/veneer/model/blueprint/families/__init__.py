"""Families (or kinds of families) whose description is tested by values, one file for each; each holds a `FAMILY`."""
