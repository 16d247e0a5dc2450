"""Op of `core.records.LinearDelta`: frozen linear layers and the records that act on them, forward and backward."""
