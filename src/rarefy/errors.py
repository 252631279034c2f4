"""What rarefy raises when the user has to change something."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# A slip of the finger, no word of another meaning: attention_softmax_fp32 is 0.67 attention_type, gtp2 0.75 gpt2.
_NEAR = 0.75
# More names than this would bury the message.
_LISTED = 25


class RarefyError(Exception):
    """A problem that the user can solve; its message is one line that says how."""


# A ValueError too, which is what pydantic takes for a finding where a validator raises it.
class ConfigError(RarefyError, ValueError):
    """A value that is not allowed.

    Args:
        path: where the value stands, for example `sparsity.update.freq`; may be empty.
        given: what was found there, worded for the user.
        allowed: what may stand there.
        fix: an example that works; left out of the message when empty.
        place: file and line, if known.

    Example:
        >>> print(ConfigError("update.freq", 0, "a whole number of steps ≥ 1", "freq: 100").under("sparsity"))
        sparsity.update.freq: 0 is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)
    """

    def __init__(self, path: str, given: object, allowed: str, fix: str = "", place: str = "") -> None:
        self.path = path
        self.given = given
        self.allowed = allowed
        self.fix = fix
        self.place = place
        example = f" (example: {fix})" if fix else ""
        where = "".join(f"{part}: " for part in (place, path) if part)
        # As the user wrote it: a file knows no None, True or False.
        shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else given
        super().__init__(f"{where}{shown} is not allowed; give {allowed}{example}")

    @property
    def key(self) -> str:
        """The key that is wrong in the mapping at `path`; empty where it is the value."""
        # Whoever refuses a key words it so, `f"the key {key!r}"`; the line of the file is looked up by it.
        named = re.match(r"the key '([^']*)'", str(self.given))
        return named[1] if named else ""

    def under(self, prefix: str) -> ConfigError:
        """The same error with its path below `prefix`."""
        return ConfigError(join_path(prefix, self.path), self.given, self.allowed, self.fix, self.place)

    def at(self, place: str) -> ConfigError:
        """The same error with its file and line in front."""
        return ConfigError(self.path, self.given, self.allowed, self.fix, place)


def join_path(prefix: str, path: str) -> str:
    """Joins two parts of a YAML path.

    Example:
        >>> join_path("trainer.init", "sparsity"), join_path("sparsity", "[1].update"), join_path("", "seed")
        ('trainer.init.sparsity', 'sparsity[1].update', 'seed')
    """
    if not prefix or not path:
        return prefix or path
    return f"{prefix}{path}" if path.startswith("[") else f"{prefix}.{path}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word, whatever its case; the known words where nothing is near and they are few.

    Example:
        >>> did_you_mean("sparsty", ["sparsity", "seed"])
        'did you mean sparsity?'
    """
    # Sorted, as a set of names has another order in every process.
    by_lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean {by_lower[near[0]]}?"
    if len(by_lower) > _LISTED:
        return f"none of the {len(by_lower)} is near it"
    return f"one of {', '.join(by_lower.values())}"
