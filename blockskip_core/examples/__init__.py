"""Small models to try the package on, without a host; shipped, so that what the documentation shows runs everywhere."""
