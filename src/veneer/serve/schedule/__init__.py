"""Decisions of serving, without torch: the requests to compute next, their pages, and the adapters in memory."""
