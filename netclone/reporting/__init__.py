"""A grafted graph and its scores, drawn: pages and plots."""
