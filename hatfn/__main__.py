"""``python -m hatfn`` is the ``hatfn`` command."""

from hatfn.experiments.cli import main

if __name__ == "__main__":
    main()
