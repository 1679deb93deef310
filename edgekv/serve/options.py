"""How a service shows itself over HTTP."""

from __future__ import annotations

import hmac
import stat
from dataclasses import dataclass, field
from pathlib import Path

from edgekv import settings
from edgekv.errors import UsageError
from edgekv.runtime.sampling import SamplingOptions

#: The largest body that is read where nothing else is said: a conversation as long as any context is a few MiB.
BODY_BYTES = 8 << 20
_MOST_KEY_BYTES = 1 << 16


class Keys:
    """The keys that clients may show; without any, nobody needs one."""

    def __init__(self, keys: tuple[bytes, ...] = ()) -> None:
        self._keys = keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def known(self, key: bytes) -> bool:
        """Return whether a key is one of them; the time that it takes does not tell how much of it was right."""
        found = [hmac.compare_digest(key, known) for known in self._keys]
        return any(found)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read keys from a file, one a line.

        Raises:
            UsageError: it cannot be read, others may read it, or it holds no key.
        """
        try:
            mode = path.stat().st_mode
            with path.open("rb") as stream:
                data = stream.read(_MOST_KEY_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot read the key file {path}: {error.strerror}") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(f"others may read the key file {path}; make it yours alone: chmod 600 {path}")
        lines = [line.strip() for line in data.splitlines()]
        keys = tuple(line for line in lines if line and not line.startswith(b"#"))
        if not keys or len(data) > _MOST_KEY_BYTES or not all(key.isascii() and len(key.split()) == 1 for key in keys):
            raise UsageError(
                f"the key file {path} must hold keys of ASCII characters without blanks, one a line, 64 KiB at the most; a line"
                " that begins with # is none"
            )
        return cls(keys)


@dataclass(frozen=True)
class FaceOptions:
    """How a service shows itself.

    Attributes:
        names: of the model; the first is the one that answers tell.
        host: where it listens, as it was given; clients may call it so.
        allowed_hosts: further names by which clients may call it.
        keys: that clients must show one of.
        isolate: clients with different keys share no pages.
        cors_origins: of pages that may talk to it, such as ``https://example.org``.
        sampling: in conversations, where a request says nothing. plain_sampling: of texts that go on.
        request_timeout_s: from the moment that a request was read.
        body_bytes: of a request at the most.
    """

    names: tuple[str, ...]
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    keys: Keys = field(default_factory=Keys)
    isolate: bool = False
    cors_origins: tuple[str, ...] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    plain_sampling: SamplingOptions = field(default_factory=SamplingOptions)
    request_timeout_s: float = 600.0
    body_bytes: int = BODY_BYTES

    def __post_init__(self) -> None:
        settings.REQUEST_TIMEOUT_S.check(self.request_timeout_s)
        settings.BODY_LIMIT.check(self.body_bytes)
        if not self.names:
            raise UsageError("a model that is served needs a name")
        if self.isolate and not self.keys:
            raise UsageError("to isolate clients from each other they need keys: --api-key-file")
