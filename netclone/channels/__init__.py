"""Which channels of a network belong together, and cutting the others out exactly."""
