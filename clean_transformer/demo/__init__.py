"""Contains the small GPT-2 of this package, and the code that generates stories and trains it."""
