"""Every error a user can meet, and the one sentence form they share: what, got, needed, next step.

    CapibaraError
    ├── ConfigError        a configuration cannot be meant as written (also a ValueError)
    ├── DataError          text or shards that cannot be used
    ├── RunError           a run directory: busy, damaged, of a later version, out of disk
    │   └── CertificateError   a certificate line or what it vouches for does not check
    └── QuorumError        too few nodes back a commit; the incumbent model is intact
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class CapibaraError(Exception):
    """Base of every error that capibara raises on purpose."""


class ConfigError(CapibaraError, ValueError):
    """A configuration, argument or name that cannot be meant as written.

    Attributes:
      details: (keys, sentence) for every value at fault, where the error is about a configuration.
    """

    details: Sequence[tuple[tuple[str, ...], str]] = ()


class DataError(CapibaraError, ValueError):
    """Text, shards or held-out splits that cannot be used as they are."""


class RunError(CapibaraError, RuntimeError):
    """A run directory that is busy, damaged, full or of a later format."""


class CertificateError(RunError):
    """A certificate line, or a file it vouches for, that does not check; the message names the place."""


class QuorumError(CapibaraError, RuntimeError):
    """Fewer nodes than needed back a commit, after every retry.

    Attributes:
      reasons: node id to reason, as in the certificate.
    """

    def __init__(self, message: str, reasons: dict[int, str] | None = None):
        super().__init__(message)
        self.reasons = dict(reasons or {})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, or None where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """The sentence for a name outside a vocabulary: `Unknown x 'y'. Did you mean 'z'? Known: …`."""
    names = sorted(known)
    guess = nearest(got, names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"Unknown {what} {got!r}.{hint} Known: {', '.join(names)}."
