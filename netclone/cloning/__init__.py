"""The product: a clone as a module, cut out, fitted, grafted, verified and taken out again."""
