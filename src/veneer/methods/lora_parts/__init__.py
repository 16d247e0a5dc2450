"""Parts of LoRA: its settings, what it refuses, how it is written, started late, and made of records."""
