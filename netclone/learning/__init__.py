"""Everything that is learned from samples, and the samples themselves."""
