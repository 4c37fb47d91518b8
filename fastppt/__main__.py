"""``python -m fastppt``: the command line."""

from fastppt.cli import main

if __name__ == "__main__":
    main()
