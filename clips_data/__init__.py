"""Makes data sets: downloads pairs, recaptions them, scores, splits and shards them."""

__version__ = "0.1.0"
