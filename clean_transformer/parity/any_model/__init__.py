"""Checks any PyTorch model on its device, operation by operation (see `check_model`)."""
