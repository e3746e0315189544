"""Single-device decoder with segment memory; reads like the papers, imports torch only."""
