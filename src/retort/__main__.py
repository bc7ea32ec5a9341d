"""`python -m retort`, the same as the `retort` command."""

from retort.cli import main

main()
