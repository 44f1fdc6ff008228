"""Shows a parity report in a terminal, as an HTML page, and as JSON."""
