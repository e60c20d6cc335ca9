"""`python -m fedobd` is the `fedobd` command."""

from fedobd.cli import main

main()
