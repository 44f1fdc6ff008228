"""Runs the command line for `python -m clean_transformer`."""

from clean_transformer.cli import main

main()
