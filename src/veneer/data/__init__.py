"""Data for training and evaluation: rows, templates, chats, encoding, packing, batches. No model."""
