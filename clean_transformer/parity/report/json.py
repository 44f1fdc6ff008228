"""Converts a parity report to JSON, and writes it to a file."""

from clean_transformer.reports.plain import Schema

SCHEMA = Schema("clean-transformer/parity", version=1)
to_json, write_json = SCHEMA.to_json, SCHEMA.write_json
