"""The one error that says to a user: not so. What is raised otherwise is a fault of the program."""


class Refused(ValueError):
    """Got this, need that, do so: one line that names the real cause."""
