"""The inputs other than the MODEL: training folders, conditionings and pictures, converted for the core."""
