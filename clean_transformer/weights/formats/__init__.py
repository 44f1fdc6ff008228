"""Defines the checkpoint formats: each module reads one format, and some also write it."""
