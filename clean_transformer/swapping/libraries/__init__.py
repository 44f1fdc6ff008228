"""The subclasses of `Library`: one for the models of this package, one for each other library."""
