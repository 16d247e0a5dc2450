"""Answers to prompts: how tokens are drawn, who answers, and files of prompts."""
