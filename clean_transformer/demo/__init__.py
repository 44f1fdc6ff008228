"""Contains the small GPT-2 of this package, and the code that trains it on generated stories."""
