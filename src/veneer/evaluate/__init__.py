"""Evaluation: perplexity, accuracy of answers and of labels."""
