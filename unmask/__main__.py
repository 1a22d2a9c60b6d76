"""``python -m unmask`` is the ``unmask`` command."""

from unmask.cli.app import main

main()
