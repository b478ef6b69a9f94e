"""Losses over the global batch, each with a small reference that it is tested against."""
