"""`python -m cosettle_cache.cli`: the same as the `cosettle-cache` script."""

from cosettle_cache.cli import main

main()
