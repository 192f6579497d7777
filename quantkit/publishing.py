"""Finished checkpoints that go to the hub: looked into before the work begins, sent in one commit, and held against it.

A commit holds all files or none, so that nobody ever sees half a checkpoint; files that arrived before a failure are
known by their checksum and are not sent again.
"""

import hashlib
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.hub import TIMEOUT, Hub, explain, failures, patiently, token_origin
from quantkit.output import MARKER
from quantkit.progress import track
from quantkit.shards import PICKLES, ShardReader
from quantkit.version import __version__

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *PICKLES)
log = logging.getLogger("quantkit")


@dataclass(frozen=True)
class Destination:
    """A repository that a checkpoint may be sent to, as the hub described it.

    Attributes:
        repo: its name with its owner.
        exists: whether it is there already.
        weights: the weights that it holds, by name, with their checksums where the hub keeps them.
    """

    repo: str
    exists: bool
    weights: dict[str, str | None]


@dataclass(frozen=True)
class Publication:
    """A checkpoint's way to the hub, as the user asked for it: the words of `push`."""

    repo: str
    private: bool = False
    replace_weights: bool = False
    commit_message: str | None = None
    token: str | None = None

    def command(self, folder: Path) -> str:
        """The command line that pushes a folder later; a token is not written out."""
        words = ["quantkit", "push", str(folder), self.repo]
        words += ["--private"] * self.private + ["--replace-weights"] * self.replace_weights
        words += [] if self.commit_message is None else ["--commit-message", self.commit_message]
        return shlex.join(words) + (" --token TOKEN" if self.token is not None else "")

    def check(self) -> Destination:
        """The repository, if a checkpoint can be sent there with this token; nothing is made or changed on the hub.

        Raises:
            QuantkitError: the name, the token, or what lies there already doesn't allow it.
        """
        to = self._find()
        if to.weights and not self.replace_weights:
            raise QuantkitError(_holds_weights(to, sorted(to.weights)))
        return to

    def push(self, folder: Path, progress: bool = True) -> dict[str, Any]:
        """Send the folder, and return what was sent and where it lies: see the function `push`."""
        files = _files(folder)
        later = f"go on with: {self.command(folder)}"
        try:
            to = self._find()
            stale = [name for name, known in to.weights.items() if name not in files or not _is(files[name], known)]
            if stale and not self.replace_weights:
                raise QuantkitError(_holds_weights(to, stale))
            pushed, sent = _send(files, to, sorted(set(stale) - set(files)), self, progress)
        except failures() as error:
            reason = explain(error, self.repo, Hub(token=self.token))
            raise QuantkitError(f"{folder} is whole but was not pushed to {self.repo}: {reason}; {later}") from error
        except QuantkitError as error:
            raise QuantkitError(f"{folder} is whole but was not pushed: {error}; {later}") from error
        except KeyboardInterrupt:
            log.warning("%s is whole but was not pushed; %s", folder, later)
            raise
        try:
            _hold_against(pushed, sent, self.token)
        except failures() as error:
            reason = explain(error, self.repo, Hub(token=self.token))
            made = f"{to.repo} has it at commit {pushed['commit']}, but that could not be looked at"
            raise QuantkitError(f"{made}: {reason}; to be sure: {self.command(folder)}") from error
        return pushed

    def _find(self) -> Destination:
        """The repository as it is now, which this token may write to or make."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo)
            if constants.is_offline_mode():
                raise QuantkitError("HF_HUB_OFFLINE is set, and nothing can be pushed to the hub; unset it")
            origin = token_origin(self.token)
            if origin is None:
                raise QuantkitError(
                    f"pushing to {self.repo} takes a token and there is none; make one that may write at "
                    f"{constants.ENDPOINT}/settings/tokens and give it as --token"
                )
            api = HfApi(token=self.token)
            account = patiently(api.whoami)
            _refuse_reader(account, origin)
            name = self.repo if "/" in self.repo else f"{account['name']}/{self.repo}"
            found = _look_up(api, name)
        except failures() as error:
            reason = explain(error, self.repo, Hub(token=self.token))
            raise QuantkitError(f"cannot push to {self.repo}: {reason}") from error
        if found is None:
            _refuse_stranger(account, name, origin)
            return Destination(name, False, {})
        return _existing(found, name, self.private)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    replace_weights: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Send a finished checkpoint to the hub, in one commit, and return what was sent and where it lies.

    Args:
        folder: a folder that `quantize` wrote. All its files are sent, but those whose names begin with a dot.
        repo: the repository, as owner/name; made if it doesn't exist. A name alone is one of the token's account.
        private: if it is made, make it a private one.
        replace_weights: put these weights in the place of other ones that the repository holds.
        commit_message: what the commit says.
        token: access token; by default that of HF_TOKEN or of `hf auth login`.
        progress: show progress on stderr.

    Returns:
        `repo`, `url`, `commit`, `files` (name to bytes), `bytes`, and `removed`: weights that made room for these.

    Raises:
        QuantkitError: it can't be sent; the repository is as it was then, and the message says how to go on.
    """
    publication = Publication(repo, private, replace_weights, commit_message, token)
    return publication.push(Path(folder).expanduser(), progress)


def _look_up(api: Any, name: str) -> Any:
    """The hub's description of a repository that this token may write to, or None when there is no such repository."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        found = patiently(lambda: api.model_info(name, files_metadata=True, timeout=TIMEOUT))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    try:
        patiently(lambda: api.auth_check(found.id, write=True))
    except HfHubHTTPError as error:
        if error.response.status_code != 404 or isinstance(error, RepositoryNotFoundError):
            raise
        # A mirror that doesn't know this question: the commit will show it.
    return found


def _existing(found: Any, name: str, private: bool) -> Destination:
    """The repository that is there already, unless it is a public one and a private one is asked for."""
    if found.id != name:
        log.warning("%s is called %s now", name, found.id)
    if private and not found.private:
        raise QuantkitError(f"{found.id} exists and is public; make it private in its settings, or push to another")
    weights = {each.rfilename: getattr(each.lfs, "sha256", None) for each in found.siblings or () if _is_weight(each)}
    return Destination(found.id, True, weights)


def _is_weight(sibling: Any) -> bool:
    return any(Path(sibling.rfilename).match(pattern) for pattern in WEIGHTS) and "/" not in sibling.rfilename


def _holds_weights(to: Destination, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{to.repo} holds other weights already ({names[0]}{more}); push to another repository, or give "
        "--replace-weights to put these in their place"
    )


def _refuse_reader(account: dict[str, Any], origin: str) -> None:
    """Return nothing; raise QuantkitError for a token that may only read."""
    if _access(account).get("role") == "read":
        raise QuantkitError(f"{origin} may only read; give a --token that may write")


def _refuse_stranger(account: dict[str, Any], name: str, origin: str) -> None:
    """Return nothing; raise QuantkitError when a token may not make a repository under this owner.

    What the hub says of a token differs by its kind: only what is said is held against it.
    """
    owner, me = name.split("/")[0], account["name"]
    roles = {each.get("name"): each.get("roleInOrg") for each in account.get("orgs") or ()}
    if owner != me and owner not in roles:
        owners = ", ".join([me, *sorted(map(str, roles))])
        raise QuantkitError(f"{origin} belongs to {me}, who cannot make {name}; push to a repository of {owners}")
    if owner != me and roles[owner] == "read":
        raise QuantkitError(f"{me} may only read in {owner}; ask there for the role write, or push to {me}/NAME")
    scoped = (_access(account).get("fineGrained") or {}).get("scoped")
    if _access(account).get("role") == "fineGrained" and isinstance(scoped, list):
        able = [each.get("entity") or {} for each in scoped if "repo.write" in each.get("permissions", ())]
        if owner not in {each.get("name") for each in able}:
            raise QuantkitError(f"{origin} may not write to repositories of {owner}; give it that right, or another")


def _access(account: dict[str, Any]) -> dict[str, Any]:
    """What the hub says of the token itself."""
    return (account.get("auth") or {}).get("accessToken") or {}


def _files(folder: Path) -> dict[str, Path]:
    """Every file that is sent, by its name in the repository; CheckpointError for what is no whole checkpoint."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give one that quantkit quantize wrote")
    if not (folder / "config.json").is_file() or (folder / MARKER).exists():
        raise CheckpointError(f"{folder} is no finished checkpoint; give a folder that quantkit quantize wrote")
    ShardReader(folder)
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in paths.items() if not any(p.startswith(".") for p in name.parts)}


def _is(path: Path, checksum: str | None) -> bool:
    """Whether a file is the one that the hub holds; one without a checksum (the index) is small, and just replaced."""
    if checksum is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == checksum


def _send(
    files: dict[str, Path], to: Destination, removed: list[str], asked: Publication, progress: bool
) -> tuple[dict[str, Any], list[Any]]:
    """What `push` returns, and the operations, after the files went one by one and the commit that holds them all."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=asked.token)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if not to.exists:
        patiently(lambda: api.create_repo(to.repo, private=asked.private or None, exist_ok=True))
    sent = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    label = f"pushing {len(files)} files, {sum(sizes.values()):,} bytes, to {to.repo}"
    with _bars(progress and sys.stderr.isatty()):
        for each in track(sent, label, unit="files", disable=not progress):
            api.preupload_lfs_files(to.repo, additions=[each], free_memory=False)
    operations = [*sent, *(CommitOperationDelete(name) for name in removed)]
    message = asked.commit_message or f"Checkpoint written by quantkit {__version__}"
    commit = patiently(lambda: api.create_commit(to.repo, operations, commit_message=message))
    where = {"repo": to.repo, "url": f"{api.endpoint}/{to.repo}", "commit": commit.oid}
    return {**where, "files": sizes, "bytes": sum(sizes.values()), "removed": removed}, sent


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show huggingface_hub's own bars, of the bytes of each file, or don't, and leave them as they were."""
    from huggingface_hub import constants, utils

    change = {True: utils.disable_progress_bars, False: utils.enable_progress_bars}
    hidden = utils.are_progress_bars_disabled()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or hidden is not shown:
        yield  # as the user's environment asks, or as it is
        return
    change[not shown]()
    try:
        yield
    finally:
        change[hidden]()


def _hold_against(pushed: dict[str, Any], sent: list[Any], token: str | None) -> None:
    """Return nothing; raise QuantkitError when the commit doesn't hold every file with its size and checksum."""
    from huggingface_hub import HfApi

    repo, commit = pushed["repo"], pushed["commit"]
    api = HfApi(token=token)
    info = patiently(lambda: api.model_info(repo, revision=commit, files_metadata=True, timeout=TIMEOUT))
    there = {each.rfilename: each for each in info.siblings or ()}
    for each in sent:
        name, size = each.path_in_repo, pushed["files"][each.path_in_repo]
        found: Any = there.get(name)
        same = found is not None and found.size == size
        if same and found.lfs is not None:
            same = found.lfs.sha256 == each.upload_info.sha256.hex()
        if not same:
            other = "nothing" if found is None else f"another file of {found.size:,} bytes"
            raise QuantkitError(f"{repo} holds {other} for {name} ({size:,} bytes) at commit {commit}; push it again")
