"""What all parts of a config have in common."""

from pydantic import ConfigDict


class Strict:
    """Makes a field that a JSON config has and the dataclass lacks an error."""

    __pydantic_config__ = ConfigDict(extra="forbid")
