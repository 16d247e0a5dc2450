"""Op of `records.deltas.LinearDelta`: frozen linear layers and the records that act on them, forward and backward."""
