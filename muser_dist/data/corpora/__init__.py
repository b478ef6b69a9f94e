"""Makers of corpora: each writes WebDataset shards with audio and the metadata that templates use."""
