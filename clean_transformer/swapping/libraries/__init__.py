"""Support for models of other libraries and of this package: one `Library` class for each."""
