"""Seven Jupyter notebooks about the model. `clean-transformer notebook` lists and copies them."""
