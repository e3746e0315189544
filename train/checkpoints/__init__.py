"""Checkpoints: saved beside training, verified on load, read at any layout."""
