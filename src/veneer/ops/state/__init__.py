"""Mixing of tokens by what a sequence has left behind, of a fixed size: short convolutions."""
