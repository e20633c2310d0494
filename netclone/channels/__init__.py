"""Channels: which of them belong together, and taking them out exactly."""
