"""Embeddings to the loss."""
