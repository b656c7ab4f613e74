"""Run the ``ila`` command: ``python -m ila``."""

from ila.cli import main

if __name__ == "__main__":
    main()
