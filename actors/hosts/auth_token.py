"""The token that Ray asks its clients for, and that exporters therefore ask theirs for (docs.ray.io, Ray security, token authentication)."""

from __future__ import annotations

import os
from pathlib import Path


class NoToken(RuntimeError):
    """Ray asks for a token that this process does not know. `str()` is one line."""


def wanted_token() -> str | None:
    """What clients must show; None: nothing. Raises NoToken."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := token_of_ray():
        return token
    raise NoToken("RAY_AUTH_MODE = token: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token must have the token")


def token_of_ray() -> str | None:
    """The token that Ray's clients show on this host, if there is one."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text().strip() or None) if path.exists() else None
