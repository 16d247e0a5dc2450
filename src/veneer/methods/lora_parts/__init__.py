"""Parts of LoRA: settings by module, what it refuses, and how a start that is taken off is written."""
