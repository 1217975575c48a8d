"""What a run takes, before it: bytes and operations counted, and whether they fit."""
