"""Networks and their images by name: what checkpoints hold, and what they say of how they were trained."""
