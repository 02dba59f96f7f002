"""Arithmetic with adapters: the difference of two checkpoints, sums, lower ranks, comparisons.

ΔW is handled through its factors: no m × n matrix is formed, but for the difference of two
checkpoints, which is one.
"""
