"""Small models for trying the package without a host; shipped, so that the documentation's examples run everywhere."""
