"""Program of a model: its operations in order, each one class in one file, read from the description of the model."""
