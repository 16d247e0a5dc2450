"""Tools in conversations: their format, read off the model's chat template, and calls out of the model's text."""
