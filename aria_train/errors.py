"""Errors whose cause is outside this code: the command line prints them as one paragraph and exits with status 2.

Everything else that goes wrong is a defect and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can mend. The message says what was given, where, what is allowed and what to do."""

    spokesman: bool | None = None
    """Of several ranks that met it, whether this one prints it; None: not settled, rank 0 does."""


class ConfigError(UserError):
    """A configuration file, key, value, or combination of values that cannot work."""


class DataError(UserError):
    """A corpus, tokenizer, or input file that is missing, unreadable, or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, or belongs to another model or run."""
