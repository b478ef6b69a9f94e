"""Descriptions out of metadata, written by a language model."""
