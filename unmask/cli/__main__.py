"""``python -m unmask.cli`` is the ``unmask`` command."""

from unmask.cli.app import main

if __name__ == "__main__":
    main()
