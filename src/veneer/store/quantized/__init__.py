"""Checkpoints that other libraries quantized: one file for each ``quant_method`` of ``config.json``."""
