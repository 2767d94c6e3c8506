"""An expanded model in the stacks that people train, ship and serve with: situations, and their table.

``python -m benchmarks.stacks`` runs every situation and writes the table; the tests run the same list. Each file of
this package is about one kind of stack and registers its rows by ``situation``.
"""
