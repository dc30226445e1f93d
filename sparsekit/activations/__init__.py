"""Calibrators of activation sparsity. One file per method; the file name is the method's name in recipes."""
