"""How good a network is, what a clone changed in it, and what it costs."""
