"""The one exception that a command line turns into a line of text."""


class UserError(ValueError):
    """A mistake of the user's: the message names the culprit and the mend; a CLI prints it and exits with 2."""
