"""Memory and time of a run before anything is loaded: the step itself, traced on tensors without values."""
