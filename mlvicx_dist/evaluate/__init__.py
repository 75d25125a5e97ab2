"""Checkpoints to evidence."""
