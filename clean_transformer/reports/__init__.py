"""Code for several kinds of reports: JSON, HTML pages, heat maps, a description of the machine."""
