"""What all reports share: JSON, HTML pages, heat maps, and the machine's description."""
