"""Parts of LoRA: its settings with their checks, and its plain form."""
