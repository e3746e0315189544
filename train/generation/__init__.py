"""`longhaul generate`: a prompt of any length read, and more written."""
