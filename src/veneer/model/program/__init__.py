"""Program of a model: its operations in order, read from the model's description. Each kind of operation is one class
in one file.
"""
