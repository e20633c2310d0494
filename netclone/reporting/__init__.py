"""A grafted network, drawn: the page of a report, and plots."""
