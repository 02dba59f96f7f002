"""Names as data: the same weight under other names, fused, split, or stacked.

Tools, live models and files name weights differently: prefixes come and go, q, k and v are one
tensor here and three there, experts are a stack in memory and a tensor each on disk. `rules.txt`
says so, one line a rule; `resolve` finds where each target of an adapter stands in a base, and
`relayout` writes the adapter down for that base, without a change of ΔW.
"""
