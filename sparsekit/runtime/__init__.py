"""Multiplying with packed weights: native kernels where they are installed, torch where they are not."""
