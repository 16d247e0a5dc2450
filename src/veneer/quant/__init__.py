"""How a frozen weight is stored: one file per format, each a `core.frozen.FrozenWeight`."""
