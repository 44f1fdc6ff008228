"""Checks any PyTorch model on its device, operation by operation. `check_model` is the function."""
