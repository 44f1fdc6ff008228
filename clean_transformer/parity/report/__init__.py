"""A parity report for people and for programs: in a terminal, as an HTML page, as JSON."""
