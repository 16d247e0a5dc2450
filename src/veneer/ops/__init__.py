"""Kernel boundary. One file per family of ops holds the public functions and checks their arguments; `dispatch`
picks who computes: ``reference/`` (plain torch, the specification), ``cpu/`` (C++) or ``triton/`` (CUDA).
"""
