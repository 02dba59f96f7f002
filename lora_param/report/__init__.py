"""What is said about models, adapters and files: rows of plain data, then their rendering.

`stats` and `figures` need neither torch nor Rich nor numpy, so that a report on file headers costs
nothing; `norms` needs numpy, `tree` and `terminal` need Rich, `page` Jinja2 and Matplotlib.
"""
