"""A model as a graph of operators: how to capture, trace, run and count it, and a table of operators."""
