"""Plain torch: obvious, and the specification of every op."""
