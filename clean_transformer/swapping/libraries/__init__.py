"""Subclasses of `Library`, which find and replace modules in the models of different libraries."""
