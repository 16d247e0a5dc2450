"""Tools in conversations: the call format of a chat template, and parsing calls from the model's text."""
