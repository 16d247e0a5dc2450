"""Record of a run in its folder: what it was, how it goes on, and who may write there."""
