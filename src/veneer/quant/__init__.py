"""Storage formats of a frozen weight: one file for each format, each a `records.frozen.FrozenWeight`."""
