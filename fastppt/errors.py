"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """What was given, what is wanted, and the next thing to do, in one message.

    The command line prints it without a traceback and exits with code 2.
    """
