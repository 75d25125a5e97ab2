"""Sweeps: trials of a pretraining, judged by a probe."""
