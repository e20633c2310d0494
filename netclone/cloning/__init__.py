"""A clone as a module: cut out of the source, fitted, grafted onto a target, verified, and removed again."""
