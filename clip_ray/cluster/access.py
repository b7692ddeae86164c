"""Which cluster is meant, and that it lets in nobody who has not its token."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_ray.cluster.local import FOLDER, running
from clip_ray.errors import ConfigError, RunError

TIMEOUT_S = 10
DEFAULT_TOKEN = Path.home() / ".ray" / "auth_token"


@dataclass(frozen=True)
class Access:
    """A cluster's dashboard, and the token for it."""

    dashboard: str
    token: str | None

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the dashboard must carry."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as Ray's state API tells of them."""
        answer = json.loads(_get(f"{self.dashboard}/api/v0/nodes", self.headers))
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]


def access(address: str | None, insecure: bool = False, folder: Path = FOLDER) -> Access:
    """The dashboard at `address`, or the environment's, or that of the local cluster.

    Raises ConfigError where none is named, and RunError where it cannot be reached, wants no token
    (unless `insecure`), or refuses the one that is there.
    """
    local = running(folder)
    dashboard = address or _of_environment() or (local.dashboard if local else None)
    if dashboard is None or not dashboard.startswith(("http://", "https://")):
        raise ConfigError(
            f"the cluster's address is {dashboard}: must be its dashboard's, http://HOST:PORT; "
            "give --address, set RAY_API_SERVER_ADDRESS, or clip-ray cluster start"
        )
    dashboard = dashboard.rstrip("/")
    if _wants_token(dashboard):
        token_file = local.token_file if local and local.dashboard == dashboard else None
        found = Access(dashboard, _token(token_file))
        _try(found)
        return found
    if not insecure:
        raise RunError(
            f"{dashboard} lets in everybody who reaches it, to run any code: nothing is sent. "
            "Start the cluster with RAY_AUTH_MODE=token, or give --insecure"
        )
    return Access(dashboard, None)


def head_address(address: str | None, folder: Path = FOLDER) -> str:
    """The head at `address`, or RAY_ADDRESS's, or the local cluster's, for a driver beside it.

    The environment is given the local cluster's token, which Ray looks for as it is imported.
    Raises ConfigError.
    """
    head = address or os.environ.get("RAY_ADDRESS")
    if head is None and (local := running(folder)):
        os.environ.update(local.environment())
        head = local.gcs
    if head is None or "://" in head:
        raise ConfigError(
            f"the cluster's address is {head}: must be its head's, HOST:PORT; give --address, set "
            "RAY_ADDRESS, or ask through the dashboard: clip-ray submit doctor CONFIG"
        )
    return head


def _of_environment() -> str | None:
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _wants_token(dashboard: str) -> bool:
    try:
        answer = _get(f"{dashboard}/api/authentication_mode", {})
    except urllib.error.HTTPError:  # a Ray that knows of no tokens
        return False
    except (OSError, ValueError) as error:
        raise RunError(f"{dashboard} cannot be reached: {error}") from None
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(answer).get("authentication_mode") == "token"
    return False


def _token(file_of_cluster: str | None) -> str:
    """The token, from where Ray's own clients look for it too."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    file = Path(file_of_cluster or os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN)
    try:
        token, mode = file.read_text().strip(), stat.S_IMODE(file.stat().st_mode)
    except OSError:
        raise RunError(
            f"the cluster wants a token, and {file} holds none: set RAY_AUTH_TOKEN_PATH"
        ) from None
    if mode & 0o077:
        raise RunError(f"the token {file} has mode {mode:04o}: must be 0600; chmod 600 {file}")
    return token


def _try(found: Access) -> None:
    try:
        _get(f"{found.dashboard}/api/version", found.headers)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise RunError(f"{found.dashboard} answers {error.code}: {error.reason}") from None
        raise RunError(
            f"{found.dashboard} refuses the token: set RAY_AUTH_TOKEN_PATH to the file with the "
            "cluster's"
        ) from None
    except OSError as error:
        raise RunError(f"{found.dashboard} cannot be reached: {error}") from None


def _get(url: str, headers: dict[str, str]) -> bytes:
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return answer.read()
