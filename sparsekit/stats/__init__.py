"""Streaming statistics of the inputs of linears: one file each."""
