"""Families whose descriptions are tested by values, one file for each (or for a kind of them) with a `FAMILY`."""
