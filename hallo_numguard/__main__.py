"""Lets `python -m hallo_numguard` do what the command does."""

from hallo_numguard.cli import main

main(prog_name="hallo-numguard")
