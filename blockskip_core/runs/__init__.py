"""A run as a file: what to train, on what, with which host, readable by a command line on another machine."""
