"""The errors that a user can mend, told apart by the exit code they lead to."""


class ConfigError(ValueError):
    """The configuration is wrong: nothing was started. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on: storage, data or cluster are not as they must be. Exit code 1."""
