"""Support for models of other libraries and for ours: one `Library` in one file per library."""
