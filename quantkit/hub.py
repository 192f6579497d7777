"""The hub: models that come from it, and one sentence for whatever may go wrong with it.

huggingface_hub does the work; it reads HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. What is added here: a line
when a model comes from the cache although the hub was asked, progress also where stderr is a file, and errors that are
told with their remedy. Nothing here imports huggingface_hub before it is needed.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import CheckpointError
from quantkit.progress import Steps

TIMEOUT = 30.0
"""Seconds that the hub has for an answer about a repository."""

WAITS = (1, 2, 4)
"""Seconds before each new try after an answer of BUSY, unless the hub names a time itself."""

BUSY = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60
LONGEST_REASON = 300
MEGABYTE = 10**6

T = TypeVar("T")
log = logging.getLogger("quantkit")


@dataclass(frozen=True)
class Hub:
    """How to find a model on the hub, with huggingface_hub's words."""

    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    trust_remote_code: bool = False
    progress: bool = True

    @property
    def download(self) -> dict[str, Any]:
        """The keyword arguments that huggingface_hub takes."""
        return {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}


def download(name: str, hub: Hub, skip: Sequence[str]) -> Path:
    """The folder in the hub's cache that holds a model; what isn't there yet is fetched.

    Without an answer from the hub the model is taken from the cache, and a line on stderr says so.

    Args:
        name: the model, as org/name.
        hub: how to find it.
        skip: patterns of files to leave out.

    Raises:
        CheckpointError: there is no such model or revision, it can't be seen with this token, or it can't be reached
            and isn't in the cache.
    """
    from huggingface_hub import snapshot_download

    words = {**hub.download, "ignore_patterns": list(skip)}
    try:
        commit, sizes = listed(name, hub, skip)
    except failures() as error:
        return without_an_answer(name, hub, words, error)
    missing = [size for file, size in sizes.items() if cached(name, file, commit, hub) is None]
    try:
        with _counted(f"downloading {name}", sum(missing), hub.progress) as counter:
            folder = Path(patiently(lambda: snapshot_download(name, tqdm_class=counter, **words)))
    except failures() as error:
        raise CheckpointError(f"{name} cannot be downloaded: {explain(error, name, hub)}") from error
    if folder.name != commit:
        log.warning("%s is taken at commit %s, though the hub named %s before", name, folder.name, commit)
    return folder


def listed(name: str, hub: Hub, skip: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The commit that is asked for, and the bytes of every file of it that is wanted; raises what `failures` lists."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi(token=hub.token)
    info = patiently(lambda: api.model_info(name, revision=hub.revision, files_metadata=True, timeout=TIMEOUT))
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    return info.sha, {file: sizes[file] for file in filter_repo_objects(list(sizes), ignore_patterns=list(skip))}


def cached(name: str, file: str, commit: str, hub: Hub) -> Path | None:
    """Where a file of a commit lies in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, cache_dir=hub.cache_dir, revision=commit)
    return Path(found) if isinstance(found, str) else None


def without_an_answer(name: str, hub: Hub, words: dict[str, Any], error: Exception) -> Path:
    """The model's folder in the cache where the hub gave no answer; CheckpointError where it answered with a no."""
    if not is_passing(error):
        reason = explain(error, name, hub)
        raise CheckpointError(f"{name} is no folder, and the hub does not give it: {reason}") from error
    return _from_cache(name, hub, words, error)


def _from_cache(name: str, hub: Hub, words: dict[str, Any], error: Exception) -> Path:
    """The model's folder in the cache, or CheckpointError with the reason why the hub wasn't asked or didn't answer."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    reason = explain(error, name, hub)
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **words))
    except failures() as absent:
        where = hub.cache_dir or constants.HF_HUB_CACHE
        kind = "not whole" if type(absent).__name__ == "IncompleteSnapshotError" else "not"
        which = "it" if hub.revision is None else f"its revision {hub.revision}"
        raise CheckpointError(
            f"{name} is no folder, and the hub does not give it: {which} is {kind} in the cache {where}, and {reason}"
        ) from error
    if not isinstance(error, OfflineModeIsEnabled):
        log.warning("%s is taken from the cache at commit %s: %s", name, folder.name, reason)
    return folder


@contextmanager
def _counted(label: str, nbytes: int, progress: bool) -> Iterator[type]:
    """A class for huggingface_hub's `tqdm_class` that draws nothing and advances the progress on stderr."""
    from tqdm import tqdm

    lock = threading.Lock()
    seen: dict[int, float] = {}
    total = -(-nbytes // MEGABYTE)
    with Steps(label, total, "MB", disable=not progress or not total) as steps:
        shown = 0

        class Counter(tqdm):  # type: ignore[misc]
            """Counts bytes: those of the network and those on disk have a bar each, and the larger count is shown."""

            def __init__(self, *arguments: Any, **words: Any) -> None:
                self.counts = words.get("unit") == "B"
                super().__init__(*arguments, **{**words, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                nonlocal shown
                with lock:
                    if self.counts:
                        seen[id(self)] = seen.get(id(self), 0) + (n or 0)
                        done = min(total, int(max(seen.values()) // MEGABYTE) if max(seen.values()) < nbytes else total)
                        for _ in range(shown, done):
                            steps.advance()
                        shown = max(shown, done)
                return None

        yield Counter


def patiently(call: Callable[[], T], *, broken: bool = False) -> T:
    """What the call returns; where the hub says that it is busy or has an error of its own, it is asked again.

    `broken` says that it is asked again, too, where a connection breaks or no answer comes.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for wait in WAITS:
        try:
            return call()
        except HTTPError as error:
            answered = isinstance(error, HfHubHTTPError)
            if error.response.status_code not in BUSY if answered else not broken:
                raise
            seconds = min(max(wait, told_to_wait(error) or 0), LONGEST_WAIT) if answered else wait
            what = f"the hub answers {error.response.status_code}" if answered else f"no answer came ({_line(error)})"
            log.warning("%s; asking again in %d s", what, seconds)
            time.sleep(seconds)
    return call()


def told_to_wait(error: Any) -> int | None:
    """Seconds that the hub's answer asks to wait, or None."""
    headers = error.response.headers
    value = str(headers.get("Retry-After", ""))
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", str(headers.get("RateLimit", "")).replace(" ", ""))
    if value.isdigit():
        return int(value)
    return int(limit.group(1)) if limit else None


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the network, the hub, the disk or a name is at fault."""
    from huggingface_hub import errors

    # HTTPError is the root of what its HTTP client raises, whichever client that is.
    found = [OSError, ValueError, RuntimeError, errors.HTTPError, getattr(errors, "XetDownloadError", OSError)]
    return tuple(found)


def is_passing(error: Exception) -> bool:
    """Whether the hub wasn't asked or gave no answer of its own: offline, unreachable, busy or broken."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY
    return isinstance(error, (OfflineModeIsEnabled, HTTPError))


def explain(error: BaseException, repo: str, hub: Hub) -> str:
    """What went wrong, and what to do about it, without a full stop: `HF_HUB_OFFLINE is set; unset it or ...`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    if str(error).startswith("Invalid metadata in README.md"):
        reason = _line(error).removeprefix("Invalid metadata in README.md.").strip(" -")
        return f"the hub refuses the first lines of README.md ({reason}); mend them in the folder"
    error = _root(error)
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or give the --cache-dir that it is in"
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo, hub, endpoint)
    if isinstance(error, HFValidationError):
        return f"{repo!r} is no name that the hub allows ({_line(error)}); give one like org/name"
    if isinstance(error, HTTPError):
        kind = "gives no answer in time" if "Timeout" in type(error).__name__ else "cannot be reached"
        reason = _line(error) or type(error).__name__
        return f"{endpoint} {kind} ({reason}); check the network, HF_ENDPOINT and HTTPS_PROXY, and run it again"
    if "Consistency check failed" in str(error):
        found = str(error).splitlines()[0].removeprefix("Consistency check failed: ").rstrip(".")
        return f"what came is not what the hub announced ({found}); run it again"
    if "does not seem to be served by a Hugging Face Hub" in str(error):
        return f"{endpoint} does not answer as a hub does; check HF_ENDPOINT and the proxy"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the disk'} cannot be written ({error.strerror}); mend that and run it again"
    return f"{_line(error) or type(error).__name__}; mend that and run it again"


def _explain_answer(error: Any, repo: str, hub: Hub, endpoint: str) -> str:
    """What an answer of the hub that is an error means, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status, token = error.response.status_code, token_origin(hub.token)
    said = _line(error.server_message or "") or f"status {status}"
    if isinstance(error, GatedRepoError):
        account = "no token is given" if token is None else f"the account of {token} has not been let in"
        remedy = "and give --token" if token is None else "or give another --token"
        return f"{repo} is gated and {account}; accept its terms at {endpoint}/{repo} {remedy}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {hub.revision!r}; give a branch, tag or commit that it has as --revision"
    if isinstance(error, RepositoryNotFoundError):
        seen = "without a token" if token is None else f"with {token}"
        return f"{endpoint} has no {repo} that can be seen {seen}; check the name, or give --token if it is private"
    if status == 401:
        remedy = f"make one at {endpoint}/settings/tokens and give it as --token"
        if token is None:
            return f"{endpoint} asks for a token ({said}); {remedy}"
        return f"{endpoint} does not accept {token} ({said}); {remedy}"
    if status == 403:
        whose = "an anonymous user" if token is None else token
        return f"{endpoint} does not allow this to {whose} ({said}); give a --token that may do it"
    if status in BUSY:
        seconds = told_to_wait(error)
        when = "later" if seconds is None else f"in {seconds} s"
        kind = "is asked too often" if status == 429 else "has an error of its own"
        return f"{endpoint} {kind} (status {status}); run it again {when}"
    return f"{endpoint} answers {status} ({said}); mend that and run it again"


def _root(error: BaseException) -> BaseException:
    """The error that an error was raised from, where that says more: of the hub or the network."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (HTTPError, OfflineModeIsEnabled)):
            break
        found = found.__cause__
    return found or error


def token_origin(token: str | None) -> str | None:
    """Where the token comes from that the hub is shown, in words, or None when there is none."""
    from huggingface_hub import get_token

    if token is not None:
        return "the token of --token"
    if get_token() is None:
        return None
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token that `hf auth login` saved"


def _line(error: object) -> str:
    """What an error says, on one line of a length to be read."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."
