"""Seven walkthroughs as Jupyter notebooks. `clean-transformer notebook` lists and copies them."""
