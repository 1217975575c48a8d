"""The inputs besides the MODEL, conditionings and pictures, converted for the core."""
