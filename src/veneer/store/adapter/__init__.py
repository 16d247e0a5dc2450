"""Adapter in a folder, in PEFT's format: its tensors, saved and loaded strictly, and the records that they mean."""
