"""Defines the checkpoint formats. `weights/load.py` finds every `Format` in this folder's modules."""
