"""Decisions of serving, without torch: who is computed next, on which pages, with which adapters in memory."""
