"""The one exception a user of the demo is meant to see, as one line."""


class DemoError(Exception):
    """Something the user can mend: a path, a column, a flag, a label."""
