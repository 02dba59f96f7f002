"""Weights on disk: one lazily read mapping over files of any kind, and what is written from it."""
