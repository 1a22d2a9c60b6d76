"""``python -m unmask.cli`` is the ``unmask`` command."""

from unmask.cli.app import main

main()
