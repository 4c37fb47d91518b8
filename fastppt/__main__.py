"""The program: the command line, and what Ctrl-C does until a command has its own way with it."""

import os
import signal


def main() -> None:
    """Run the command line. Ctrl-C ends it there and then, with the exit code that shells give."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # No exception: cut short by one, some imports print tracebacks, abort, or go on by halves.
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from fastppt.cli import main as run

    run()


if __name__ == "__main__":
    main()
