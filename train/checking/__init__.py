"""Proves a layout against one plain process; see docs/check.md."""
