"""The small GPT-2 in this package, the stories that it was trained on, and its training script."""
