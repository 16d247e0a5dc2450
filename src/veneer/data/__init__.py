"""Data for training and evaluation: rows, templates, chats, encoding, packing, batches. Independent of the model."""
