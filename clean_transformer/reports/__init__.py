"""Code that several reports share: JSON, HTML pages, heat maps, a description of the machine."""
