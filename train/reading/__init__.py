"""What a run reads, in which order, and what proves it."""
