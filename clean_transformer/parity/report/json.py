"""Converts a parity report to JSON, writes it to a file, and reads it back."""

from clean_transformer.reports.plain import Schema

SCHEMA = Schema("clean-transformer/parity", version=2)
to_json, write_json, read_json = SCHEMA.to_json, SCHEMA.write_json, SCHEMA.read
