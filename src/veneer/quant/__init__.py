"""Storage formats of a frozen weight: one file per format, each a `core.frozen.FrozenWeight`."""
