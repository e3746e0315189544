"""Layouts: how segments, weights and optimizer states are spread over ranks."""
