"""Answers to prompts: sampling of tokens, the answering model, and files of prompts."""
