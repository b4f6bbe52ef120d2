"""`python -m ksmrs` is the `ksmrs` command."""

from ksmrs.cli import main

main()
