"""Errors whose cause is outside this code: the command line prints them as one paragraph and exits with status 2.

Everything else that goes wrong is a defect and keeps its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_RESTART = 75
"""Status of a job that ended before its work did, and goes on when started again (sysexits.h: EX_TEMPFAIL)."""

EXIT_BROKEN_PIPE = 141
"""Status of a command whose reader ended before it, as a shell has it (128 + SIGPIPE)."""


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


class DivergenceError(UserError):
    """Training that cannot go on as configured: step after step gives no usable update."""


class Stopped(Exception):
    """A run was asked to stop, has saved, and leaves. Not an error: started again, it goes on."""
