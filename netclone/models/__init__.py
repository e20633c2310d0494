"""Networks by name: architectures, checkpoints, grafted files, and the images that they want."""
