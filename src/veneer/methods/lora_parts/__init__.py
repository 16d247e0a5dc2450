"""Parts of LoRA: settings by module, and how a start that is taken off is written."""
