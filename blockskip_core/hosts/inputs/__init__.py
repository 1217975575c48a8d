"""What comes in beside the MODEL: conditionings and pictures, in the core's form."""
