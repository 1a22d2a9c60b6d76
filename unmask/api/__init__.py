"""What the names of ``unmask`` do: the command line and a notebook call the same functions.

One file a concern; ``unmask/__init__.py`` says which name lives where.
"""
