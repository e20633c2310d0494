"""A model as a graph of operators, and what is known of operators."""
