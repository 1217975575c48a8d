"""A loaded MODEL as the core wants it: run with blocks replaced, quantised, counted, identified."""
