"""Contains the small GPT-2 of this package, its training script, and its generator of stories."""
