"""Uses: the ways in which people call GPT-2, such as long texts, generation and padded batches.

Each use gets a verdict of its own.
"""
