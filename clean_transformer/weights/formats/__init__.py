"""Reads and writes checkpoints. A `Format` object in this folder describes each known format."""
