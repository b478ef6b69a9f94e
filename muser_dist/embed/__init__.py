"""Batch inference: the embeddings of all rows of shards, or of all files of a folder, as Parquet."""
