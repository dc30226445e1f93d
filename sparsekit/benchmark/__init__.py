"""Measuring a checkpoint beside its dense baseline: speed, memory, disk, and the kernel of every layer.

`session` drives, one `worker` process per contender computes, `layers` times their kernels, `result` holds what was
found, `plot` draws it.
"""
