"""Checks how accurately a device computes GPT-2 in each use, such as generating text."""
