"""The command line: one thin click command a file, each also `python -m jobs.NAME`."""
