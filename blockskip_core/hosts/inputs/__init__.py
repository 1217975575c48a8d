"""What comes in besides the MODEL: conditionings and pictures, in the core's form."""
