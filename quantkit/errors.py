"""The errors a user can cause: each message names the value, what was expected, and what to do."""


class QuantkitError(Exception):
    """A mistake that the user can mend. The command line prints it as one sentence and exits 1.

    Attributes:
        told: whether another process of the same job tells the user.
    """

    told = False


class RecipeError(QuantkitError):
    """A step, parameter, value or pattern of a recipe that cannot be carried out."""


class CheckpointError(QuantkitError):
    """A model folder, shard or tensor that is missing, damaged or of the wrong kind."""


class DataError(QuantkitError):
    """A text or data set that cannot be read, or that holds less than was asked for."""
