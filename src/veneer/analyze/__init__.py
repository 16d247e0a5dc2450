"""Analysis of adapters: spectra of updates, and the overlap and conflict of two adapters."""
