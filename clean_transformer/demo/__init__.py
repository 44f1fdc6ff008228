"""A small GPT-2 that is part of the package, the stories it was trained on, and its making."""
