"""Reshapers: methods that make a smaller dense model. One file each; the file name is the method's name."""
