"""Defines the checkpoint formats. `weights/load.py` finds every `Format` in these modules."""
