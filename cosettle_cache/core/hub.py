"""The Hugging Face hub: `hf:` names of files, `hf://` folders of stores, and what is written there.

Its client does the work, so cache, mirror, token and offline mode are the usual ones: `HF_HOME`,
`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`. What cannot be reached fails within seconds.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cosettle_cache.core.errors import (
    CheckpointError,
    CosettleError,
    OutputError,
    RemoteError,
    UsageError,
    first_line,
)
from cosettle_cache.core.files import HUB_PREFIX, inside, name_fault, sha256_file

#: Seconds to wait for the first answer of a server; the hub client alone would retry for half a minute.
PROBE_TIMEOUT_S = 4.0

WANTED_NAME = "hf:OWNER/NAME/FILE, with @REVISION and #sha256=DIGEST behind it if it is to stay the same"
_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
_NAME = re.compile(
    rf"hf:{_REPOSITORY}/(?P<file>[^@#]+)(@(?P<revision>[^#]+))?(#sha256=(?P<sha256>[0-9a-f]{{64}}))?",
    re.ASCII,
)
_FOLDER = re.compile(
    rf"hf://(?P<kind>(dataset|space)s/)?(?!(dataset|space|model|bucket)s/){_REPOSITORY}"
    r"(@(?P<revision>[^/]+))?(?P<path>/.*)?",
    re.ASCII,
)
_TOKEN_HINT = "set HF_TOKEN, or run: hf auth login"  # noqa: S105
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: `hf:OWNER/NAME/FILE@REVISION#sha256=DIGEST`, the last two if they are given."""

    repository: str
    file: str
    revision: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.repository}/{self.file}{revision}"


def parse_name(path: str | Path) -> HubFile | None:
    """Return what an `hf:` name means, None for any other path; raise `UsageError` for a malformed one."""
    if not str(path).startswith(HUB_PREFIX):
        return None
    match = _NAME.fullmatch(str(path))
    if match is None or name_fault(match["file"]):
        raise UsageError(f"{path} names no file on the hub", wanted=WANTED_NAME, found=path)
    return HubFile(*match.group("repository", "file", "revision", "sha256"))


def parse_repository(name: str) -> str:
    """Return `OWNER/NAME` of that or of `hf:OWNER/NAME`; raise `UsageError` for anything else."""
    match = re.fullmatch(f"({HUB_PREFIX})?{_REPOSITORY}", name, re.ASCII)
    if match is None:
        raise UsageError(f"{name} names no repository on the hub", wanted="hf:OWNER/NAME", found=name)
    return match["repository"]


def local_file(path: str | Path) -> Path:
    """Return the file that `path` names: itself, or for an `hf:` name the hub's, in the cache of its client.

    Asked once by a process, so that all of it works on the same file. Raises `UsageError` for a malformed
    name, `CheckpointError` where the hub has no such file, or another than the digest says.
    """
    named = parse_name(path)
    return Path(path) if named is None else _named_file(named)


@cache
def _named_file(named: HubFile) -> Path:
    path = fetch(named.repository, named.file, named.revision)
    if named.sha256 is not None and (found := sha256_file(path)) != named.sha256:
        raise CheckpointError(
            f"{named} is not the file that was pinned",
            wanted=f"sha256 {named.sha256}",
            found=f"sha256 {found}",
            hint="it has changed on the hub: name the revision you mean as FILE@REVISION, or its digest",
        )
    return path


def file_beside(path: str | Path, name: str) -> str | Path:
    """Return the path, or the `hf:` name of the same commit, of a file in the folder of another."""
    named = parse_name(path)
    if named is None:
        return inside(Path(path).parent, name)
    file = inside(Path(named.file).parent, name).as_posix()
    return str(replace(named, file=file, revision=_commit_of(named), sha256=None))


def refetch_hint(path: Path) -> str:
    """Return what to do about a damaged file: the client does not fetch again what its cache has."""
    kept = path.resolve()
    return f"remove {kept}" if kept.parent.name == "blobs" else "download it again and compare the size"


def origin_of(path: str | Path) -> str:
    """Return how a file is called where results say what they depend on: by name, on the hub with commit."""
    named = parse_name(path)
    return Path(path).name if named is None else str(replace(named, revision=_commit_of(named)))


def _commit_of(named: HubFile) -> str:
    # The client's cache has a folder for every commit.
    return _named_file(named).parts[-2 - named.file.count("/")]


def fetch(repository: str, file: str, revision: str | None = None, *, latest: bool = True) -> Path:
    """Return a file of a model repository in the client's cache, downloaded if it is not there.

    `latest` asks the hub whether the revision has moved on, where the hub answers. Raises `CheckpointError`.
    """
    import huggingface_hub

    name = HubFile(repository, file, revision)
    with _asking(CheckpointError, f"{name} cannot be fetched", repository):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if not isinstance(cached, str):
            if reason := why_unreachable(huggingface_hub.constants.ENDPOINT):
                raise CheckpointError(f"{name} cannot be fetched: {reason}", hint=_by_hand(name))
        elif not latest:
            return Path(cached)
        return Path(
            huggingface_hub.hf_hub_download(repository, file, revision=revision, etag_timeout=PROBE_TIMEOUT_S)
        )


def _by_hand(name: HubFile) -> str:
    return f"download {address_of(name.repository, name.file, name.revision)} by hand, and name that file"


def address_of(repository: str, file: str, revision: str | None = None) -> str:
    """Return the address of a file of a model repository."""
    import huggingface_hub

    return huggingface_hub.hf_hub_url(repository, file, revision=revision)


def why_unreachable(address: str) -> str | None:
    """Return why nothing can be downloaded from `address`; None where a server answers there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the file is not in the cache"
    request: Any = urllib.request.Request(address, method="HEAD")  # noqa: S310  (of our table, or the mirror)
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return None  # an answer, if not a friendly one: the server is there
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached ({error})"
    return None


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A folder of a repository at one commit."""

    kind: str
    repository: str
    commit: str
    path: str

    @property
    def url(self) -> str:
        """The `hf://` URL, with the commit."""
        return f"hf://{self._prefix}{self.repository}@{self.commit}{self.path}"

    @property
    def address(self) -> str:
        """Where its files are downloaded, each below this."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self._prefix}{self.repository}/resolve/{self.commit}{quote(self.path)}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request says: the token, where there is one."""
        import huggingface_hub

        token = huggingface_hub.get_token()
        return {} if token is None else {"authorization": f"Bearer {token}"}

    @property
    def _prefix(self) -> str:
        return "" if self.kind == "model" else f"{self.kind}s/"

    def files(self, folder: str = "", *, below: bool = False) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of the files in a folder, or of all `below` it; of none nothing."""
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        top = self.path.strip("/")
        place = f"{top}/{folder}".strip("/")
        with _asking(RemoteError, f"{self.url} cannot be read", self.repository):
            listed = huggingface_hub.HfApi().list_repo_tree(
                self.repository, place or None, recursive=below, revision=self.commit, repo_type=self.kind
            )
            try:
                for item in listed:
                    if isinstance(item, huggingface_hub.hf_api.RepoFile):
                        yield item.path.removeprefix(f"{top}/" if top else ""), item.size
            except EntryNotFoundError:
                return


def find_folder(url: str) -> HubFolder:
    """Return the folder of an `hf://` URL, its revision as the commit that it is now.

    Raises `UsageError` for a malformed URL, `RemoteError` where the hub does not answer or refuses.
    """
    import huggingface_hub

    match = _FOLDER.fullmatch(url.rstrip("/"))
    if match is None or ((path := match["path"]) and name_fault(path[1:])):
        wanted = "hf://datasets/OWNER/NAME/PATH, or hf://datasets/OWNER/NAME@REVISION/PATH"
        raise UsageError(f"{url} names no folder on the hub", wanted=wanted, found=url)
    kind, repository, path = (match["kind"] or "models/")[:-2], match["repository"], match["path"] or ""
    revision = unquote(match["revision"] or "") or None
    if revision is None or not _COMMIT.fullmatch(revision):
        with _asking(RemoteError, f"{url} cannot be read", repository):
            api = huggingface_hub.HfApi()
            info = api.repo_info(repository, repo_type=kind, revision=revision, timeout=PROBE_TIMEOUT_S)
            revision = str(info.sha)
    return HubFolder(kind, repository, revision, path)


def card_header(**facts: Any) -> str:
    """Return the metadata at the head of a repository's card."""
    import huggingface_hub

    return f"---\n{huggingface_hub.ModelCardData(**facts).to_yaml()}\n---"


def push(
    repository: str, files: Mapping[str, bytes], mark: str, message: str, *, private: bool = False
) -> str:
    """Commit files to a model repository, made if it is not there, and return the commit.

    Raises `UsageError` for a repository of something else, that is one with files and without `mark` in its
    README.md, and for a public one where it is to be `private`; `OutputError` where the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    what = f"{HUB_PREFIX}{repository} cannot be written"
    if huggingface_hub.get_token() is None:
        raise OutputError(f"{what}: there is no token", hint=_TOKEN_HINT)
    api, head = huggingface_hub.HfApi(), None
    with _asking(OutputError, what, repository):
        try:
            info = api.model_info(repository, timeout=PROBE_TIMEOUT_S)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private or None)
        else:
            head = info.sha
            if private and not info.private:
                hint = "choose another name, or make this one private in its settings"
                raise UsageError(f"{HUB_PREFIX}{repository} is there already, and public", hint=hint)
            _check_ours(repository, [item.rfilename for item in info.siblings or ()], head, mark)
        added = [huggingface_hub.CommitOperationAdd(name, data) for name, data in files.items()]
        # On top of what was looked at: somebody else's commit meanwhile is an error, not lost.
        return api.create_commit(repository, added, commit_message=message, parent_commit=head).oid


def _check_ours(repository: str, names: list[str], commit: str | None, mark: str) -> None:
    others = [name for name in names if name != ".gitattributes"]
    card = fetch(repository, "README.md", commit) if "README.md" in names else None
    if others and (card is None or mark not in card.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(
            f"{HUB_PREFIX}{repository} holds something else, and nothing in it is overwritten",
            wanted="a new or empty repository, or one that this command made",
            found=", ".join(others[:4]),
            hint="choose another name",
        )


@contextmanager
def _asking(kind: type[CosettleError], what: str, repository: str) -> Iterator[None]:
    """Turn what the hub's client says into an error of `kind` that begins with `what`."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    reasons: dict[type[Exception], tuple[str, str]] = {
        errors.GatedRepoError: ("the repository is gated", f"accept its terms at {page}, then {_TOKEN_HINT}"),
        errors.RepositoryNotFoundError: (
            "there is no such repository, or it is private",
            f"check the name; if it is private, {_TOKEN_HINT}",
        ),
        errors.RevisionNotFoundError: ("the repository has no such revision", f"see {page}/tree/main"),
        errors.LocalEntryNotFoundError: ("it is not in the cache, and the hub does not give it", "try again"),
        errors.EntryNotFoundError: ("the repository has no such file", f"see {page}/tree/main"),
        errors.OfflineModeIsEnabled: ("HF_HUB_OFFLINE is set", "unset it to reach the hub"),
    }
    try:
        yield
    except CosettleError:
        raise
    except Exception as error:
        # The client's own errors, its transport's (which differ by version) and the system's.
        reason, hint = next(
            (said for known, said in reasons.items() if isinstance(error, known)),
            (first_line(error), f"check the network, the token ({_TOKEN_HINT}) and HF_ENDPOINT"),
        )
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        raise kind(f"{what}: {reason}", found=cause and first_line(cause), hint=hint) from error
