"""Kernel boundary: one file per family of ops holds the public functions and checks their arguments.

`dispatch` picks the back end: ``reference/`` (plain torch, the specification), ``cpu/`` (C++) or ``triton/`` (CUDA).
"""
