"""A loaded MODEL in the form that the core needs: run with blocks replaced, quantised, counted, identified."""
