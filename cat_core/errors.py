"""What all errors of the core have in common."""


class CatError(Exception):
    """Something that a person can mend: the message says what was found, what was expected and what to do."""
