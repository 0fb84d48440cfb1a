"""Command line: the `ppsim` command, its flags and what it prints."""
