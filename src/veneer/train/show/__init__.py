"""Display of a run: progress, a sample of the data, trained modules, a report."""
