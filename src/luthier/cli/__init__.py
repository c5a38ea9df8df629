"""The command line: thin, one file per command; heavy modules are imported inside the commands."""
