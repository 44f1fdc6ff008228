"""Judges each use of GPT-2. A use is one way to call the model, such as generating text."""
