"""The libraries whose modules can be swapped: one file each, with a subclass of `Library`."""
