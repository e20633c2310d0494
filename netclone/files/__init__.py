"""A graph and a spec as bytes, and back: files are data that anyone may have written."""
