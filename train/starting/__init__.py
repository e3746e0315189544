"""How an attempt begins: what it is given, what of a run it goes on with."""
