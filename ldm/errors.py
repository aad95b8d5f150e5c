"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Something outside the code is wrong; the message is one line, names it and the remedy."""
