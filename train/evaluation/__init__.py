"""What a model, and its memory, is worth: measured, with intervals, as a report."""
