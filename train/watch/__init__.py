"""Watching a run: where each rank is, hangs, stragglers, the timeline, and its last words."""
