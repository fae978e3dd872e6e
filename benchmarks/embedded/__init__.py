"""Trained tiny models and text that are part of the repository."""
