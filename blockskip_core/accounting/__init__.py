"""Bytes and operations of a run, counted before it starts, and whether they fit."""
