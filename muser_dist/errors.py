"""Exceptions meant for the person who runs a job: what is wrong, where, and the mend."""


class MuserError(Exception):
    """Base of all errors whose message is written for users.

    Entry points print the message alone, without a traceback, and exit with status 2.
    """


class ConfigError(MuserError):
    """A setting is wrong, or two settings contradict each other."""


class DataError(MuserError):
    """Shards, clips or metadata cannot be used as given."""


class UnreadError(DataError):
    """Storage does not give the bytes of what is open; it may later."""


class ScoringError(DataError):
    """The validation shards say nothing about a model that is trained and exported."""


class ClusterError(MuserError):
    """The cluster cannot place what the run asks for."""


class CheckpointError(MuserError):
    """A checkpoint, an exported model or a run's folder cannot be used as given."""


class EndpointError(MuserError):
    """A language model's endpoint refuses what it is asked, or does not answer."""


class StopTraining(MuserError):
    """Going on makes no sense, and neither does trying again. Raised on all ranks at once."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
