"""Support for the models of other libraries and ours: one file and one `Library` for each."""
