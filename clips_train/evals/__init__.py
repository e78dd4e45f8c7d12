"""Scores a checkpoint on held-out samples."""
