"""What all reports share: JSON, HTML pages, heat maps, and what they ran on."""
