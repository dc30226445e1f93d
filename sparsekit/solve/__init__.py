"""Linear algebra that several methods share: damped factors, the OBS sweep, masked least squares."""
