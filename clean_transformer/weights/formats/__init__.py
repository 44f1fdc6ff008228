"""One file for each checkpoint format. `load.py` finds every `Format` that a file here defines."""
