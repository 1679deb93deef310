"""Encryption of session records and index rows: AES-256-GCM through the `cryptography` package.

A secret (the contents of a key file, or an environment variable) becomes a key with scrypt and the salt of the session.
Every record and every row has its own random nonce, and is bound to its place: moved ciphertext does not decrypt.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edgekv.errors import EngineMissing, UsageError

SALT_BYTES = 16
#: How a secret becomes a key; dklen: AES-256.
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}
NONCE_BYTES = 12
TAG_BYTES = 16
#: Where a secret is looked for when no key file is named.
KEY_VARIABLE = "EDGEKV_SESSION_KEY"
_LEAST_SECRET_BYTES = 16
#: No key is as large; a device or a wrong file may be.
_MOST_SECRET_BYTES = 64 * 1024


def find_secret(key_file: Path | None = None) -> bytes:
    """Return the secret: of a key file, else of ``EDGEKV_SESSION_KEY``, else of the keyring of the system.

    Raises:
        UsageError: none is there, or it is shorter than 16 bytes, or a key file larger than 64 KiB.
    """
    if key_file is not None:
        try:
            with key_file.open("rb") as stream:
                secret = stream.read(_MOST_SECRET_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot read the key file {key_file}: {error.strerror}") from error
        origin = f"the key file {key_file}"
        if len(secret) > _MOST_SECRET_BYTES:
            raise UsageError(f"{origin} is larger than {_MOST_SECRET_BYTES // 1024} KiB, and no key")
        secret = secret.strip()
    elif KEY_VARIABLE in os.environ:
        secret, origin = os.fsencode(os.environ[KEY_VARIABLE]), KEY_VARIABLE
    else:
        secret, origin = _from_keyring(), "the keyring entry edgekv/session"
    return check_secret(secret, origin)


def check_secret(secret: object, origin: str) -> bytes:
    """Return what may be a secret.

    Raises:
        UsageError: it is not bytes, or shorter than 16.
    """
    if not isinstance(secret, bytes):
        raise UsageError(f"{origin} must be bytes, not {type(secret).__name__}")
    if len(secret) < _LEAST_SECRET_BYTES:
        raise UsageError(f"{origin} is shorter than {_LEAST_SECRET_BYTES} bytes; make one with: openssl rand -hex 32")
    return secret


def _from_keyring() -> bytes:
    try:
        import keyring  # type: ignore[import-not-found,unused-ignore]

        secret = keyring.get_password("edgekv", "session")
    except Exception:  # no package, or no keyring on this system: both mean that nothing is there
        secret = None
    if not secret:
        raise UsageError(
            f"an encrypted session needs its key: give --key-file FILE, set {KEY_VARIABLE},"
            " or store it with: keyring set edgekv session"
        )
    return str(secret).encode()


class Cipher:
    """Encrypts and decrypts bytes with one key.

    Args:
        secret: any bytes, 16 at the least. salt: of the session; 16 bytes.

    Raises (from the constructor):
        EngineMissing: the `cryptography` package is not installed.
    """

    def __init__(self, secret: bytes, salt: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise EngineMissing(
                "encrypted sessions need the cryptography package: pip install 'edgekv[encrypt]'"
            ) from error
        self._invalid = InvalidTag
        self._aes = AESGCM(hashlib.scrypt(secret, salt=salt, **SCRYPT))

    @classmethod
    def ephemeral(cls) -> Cipher:
        """Return a cipher with a random key that is in no file: what it encrypted is unreadable once the process ends."""
        return cls(os.urandom(32), os.urandom(SALT_BYTES))

    def encrypt(self, plain: bytes | memoryview, place: bytes) -> bytes:
        """Return nonce, ciphertext and tag of ``plain``, bound to ``place``."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aes.encrypt(nonce, plain, place)

    def decrypt(self, encrypted: bytes, place: bytes) -> bytes | None:
        """Return the plain bytes, or None: another key, another place, or a changed byte."""
        try:
            return self._aes.decrypt(encrypted[:NONCE_BYTES], encrypted[NONCE_BYTES:], place)
        except (self._invalid, ValueError):
            return None
