"""Adapter folders in PEFT's format: tensors, saved and loaded strictly, and the records they describe."""
