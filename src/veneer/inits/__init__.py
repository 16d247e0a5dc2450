"""How low-rank factors start: one file per start."""
