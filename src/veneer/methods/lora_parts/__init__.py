"""Parts of LoRA: its settings, refusals, form on disk, late starts, and conversion from records."""
