"""Quantized weights on disk: one file per format, each with its arithmetic and what tells it."""
