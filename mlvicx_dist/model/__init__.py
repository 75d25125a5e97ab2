"""Batches to embeddings."""
