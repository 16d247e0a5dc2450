"""What a person sees of a run: progress, a sample, a report."""
