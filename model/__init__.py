"""Single-device decoder with segment memory; reads like the papers, on torch alone."""
