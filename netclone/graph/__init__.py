"""A model as a graph of operators: captured, traced, run and counted, and what is known about operators."""
