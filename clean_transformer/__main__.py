"""`python -m clean_transformer`: the command line, without its console script."""

from clean_transformer.cli import main

main()
