"""Where the files of a checkpoint are: a directory or a hub, from which a broken transfer goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple, Union

import requests
from filelock import FileLock
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from paddlenlp.utils.download import resolve_file_path, strtobool
from paddlenlp.utils.download.bos_download import bos_url
from paddlenlp.utils.env import MODEL_HOME
from paddlenlp.utils.log import logger
from tqdm import tqdm

from paddle_qwen1m.config import read_json as read_json
from paddle_qwen1m.weights.foreign import describe_adapter, describe_file

MODELSCOPE_SWITCH = "from_modelscope"  # an environment variable of PaddleNLP's
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_CONFIG, "tokenizer.json", "vocab.json", "merges.txt")
CHAT_TEMPLATE = "chat_template.jinja"
RELEASED = ("Qwen/Qwen2.5-7B-Instruct-1M", "Qwen/Qwen2.5-14B-Instruct-1M")

_TIMEOUT = (10, 30)  # seconds to connect, and between two pieces of a transfer
_TRIES = 5  # in a row without a single new byte
_PAUSE = 1.0  # seconds between two tries
_PIECE = 1 << 18  # bytes; what a broken connection may lose


class HubError(OSError):
    """A hub could not be reached, refused, or broke off a transfer."""


class _Bos:
    """PaddleNLP's own hub, in PaddleNLP's cache layout: <cache>/<repository>/<file>."""

    label = "PaddleNLP's hub"

    def __init__(self, repository: str, subfolder: str, cache_dir: str | None) -> None:
        self.repository = repository
        self.subfolder = subfolder
        self.cache = Path(cache_dir or MODEL_HOME)

    def _path(self, filename: str) -> Path:
        return self.cache / self.repository / self.subfolder / filename

    def cached(self, filename: str) -> Path | None:
        path = self._path(filename)
        return path if path.is_file() else None

    def fetch(self, filename: str) -> Path | None:
        path = self._path(filename)
        lock = self.cache / ".locks" / self.repository / self.subfolder / f"{filename}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HubError(
                f"the cache cannot be written: {error}; cache_dir= or PPNLP_HOME names another place"
            ) from error
        with FileLock(str(lock)):
            if path.is_file():
                return path
            url = bos_url(self.repository, filename, subfolder=self.subfolder or None)
            return path if _download(url, path) else None


class _HuggingFace:
    """Hugging Face's hub, in its own cache; after config.json every file comes from that same commit."""

    label = "Hugging Face's hub"

    def __init__(self, repository: str, subfolder: str, cache_dir: str | None) -> None:
        self.repository = repository
        self.subfolder = subfolder
        self.cache_dir = cache_dir
        self.commit: str | None = None

    def _keep_commit(self, filename: str, path: str) -> Path:
        if self.commit is None and filename == CONFIG:
            depth = len(Path(self.subfolder).parts)
            self.commit = Path(path).parents[depth].name
        return Path(path)

    def _look_up(self, filename: str) -> object:
        name = f"{self.subfolder}/{filename}" if self.subfolder else filename
        try:
            return try_to_load_from_cache(self.repository, name, cache_dir=self.cache_dir, revision=self.commit)
        except HFValidationError:
            return None

    def cached(self, filename: str) -> Path | None:
        path = self._look_up(filename)
        return self._keep_commit(filename, path) if isinstance(path, str) else None

    def fetch(self, filename: str) -> Path | None:
        if self.commit is not None and self._look_up(filename) is _CACHED_NO_EXIST:
            return None
        try:
            path = hf_hub_download(
                self.repository,
                filename,
                subfolder=self.subfolder or None,
                revision=self.commit,
                cache_dir=self.cache_dir,
                library_name="paddle_qwen1m",
            )
        except GatedRepoError as error:
            raise HubError(
                f"{self.repository} is gated: log in with `huggingface-cli login`, or set HF_TOKEN"
            ) from error
        except LocalEntryNotFoundError as error:
            raise HubError(f"cannot be reached: {_first_line(error.__cause__ or error)}") from error
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            return None
        except OSError as error:
            raise HubError(
                f"{filename}: {_first_line(error)}; what has arrived is kept, call again to go on"
            ) from error
        return self._keep_commit(filename, path)


class _Elsewhere:
    """AI Studio, or ModelScope when PaddleNLP's switch `from_modelscope` is set: PaddleNLP's own code does the work."""

    label = "AI Studio's or ModelScope's hub"

    def __init__(self, repository: str, subfolder: str, cache_dir: str | None, from_aistudio: bool) -> None:
        self.repository = repository
        self.options: dict[str, Any] = {"subfolder": subfolder, "cache_dir": cache_dir, "from_aistudio": from_aistudio}

    def cached(self, filename: str) -> Path | None:
        return None

    def fetch(self, filename: str) -> Path | None:
        try:
            path = resolve_file_path(self.repository, [filename], **self.options)
        except OSError as error:
            raise HubError(f"{filename}: {_first_line(error)}") from error
        return None if path is None else Path(path)


_Hub = Union[_Bos, _HuggingFace, _Elsewhere]


class Checkpoint(NamedTuple):
    """A checkpoint in the published layout. `hub` is None for a directory; `note` is what to tell the user, once."""

    name: str
    config_path: Path
    hub: _Hub | None = None
    note: str = ""

    @property
    def directory(self) -> Path:
        """Holds config.json and every file fetched so far."""
        return self.config_path.parent

    def announce(self) -> None:
        """Log, where it is so, that another hub than the one asked for has the checkpoint."""
        if self.note:
            logger.warning(self.note)

    def read_config(self) -> dict[str, Any]:
        """The object in config.json; ValueError, naming the file, when it holds none."""
        return read_json(self.config_path)

    def file(self, filename: str) -> Path | None:
        """A local path of the file, fetched if need be; None when the checkpoint has no such file. Raises HubError."""
        if self.hub is None:
            path = self.directory / filename
            return path if path.is_file() else None
        path_or_none = self.hub.cached(filename)
        if path_or_none is not None:
            return path_or_none
        try:
            return self.hub.fetch(filename)
        except HubError as error:
            raise HubError(f"{self.name} on {self.hub.label}: {error}") from error

    def extra_file(self, filename: str) -> Path | None:
        """Like `file`, for one that most checkpoints go without: a hub out of reach is a log line, not an error."""
        try:
            return self.file(filename)
        except HubError as error:
            logger.warning(f"going on without {filename}: {error}")
            return None

    def fetch_weights(self) -> Path:
        """The directory with the index and all its shards, or the one file. FileNotFoundError names what is missing."""
        index = self.file(WEIGHTS_INDEX)
        shards = [WEIGHTS] if index is None else _shards(index)
        if self.hub is not None:
            for shard in shards:
                if self.file(shard) is None:
                    wanted = f"{WEIGHTS_INDEX} or {WEIGHTS}" if index is None else f"{shard}, which its index names"
                    raise FileNotFoundError(f"{self.name} on {self.hub.label} has no {wanted}")
        return self.directory

    def fetch_tokenizer(self) -> Path:
        """The directory with the tokenizer's files."""
        if self.hub is not None and self.hub.cached(TOKENIZER_CONFIG) is None:
            self.file(CHAT_TEMPLATE)  # most have none: asked for before the config, whose being there says that it was
        for filename in TOKENIZER_FILES:
            self.file(filename)
        return self.directory


def locate(
    name: str | os.PathLike[str],
    *,
    from_hf_hub: bool = False,
    from_aistudio: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
) -> Checkpoint:
    """Find config.json of a directory or hub name.

    A directory wins. For a name: the copy that either hub's cache holds (the hub asked for first), then the hub asked
    for, then the other one when the first lacks the repository or is out of reach.
    Raises FileNotFoundError for a path that does not exist or holds no config.json, ValueError for a file, HubError
    when no hub has the name. A name whose first half is a directory here is a path, unless the caller says which hub.
    """
    text, inside = os.fspath(name), subfolder or ""
    if os.path.isdir(text):
        config = Path(text, inside, CONFIG)
        if not config.is_file():
            what = describe_adapter(config.parent) or "not a checkpoint in the published layout"
            raise FileNotFoundError(f"{config.parent} has no {CONFIG}: {what}")
        return Checkpoint(text, config)
    if os.path.isfile(text):
        raise ValueError(f"{text} is {describe_file(text) or 'a file: give the directory of a checkpoint'}")
    if _is_path(name):
        raise FileNotFoundError(f"{text or repr(text)}: no such directory")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    hubs: list[_Hub]
    if from_aistudio or strtobool(os.environ.get(MODELSCOPE_SWITCH, "False")):
        hubs = [_Elsewhere(text, inside, cache, from_aistudio)]
    else:
        hubs = [_Bos(text, inside, cache), _HuggingFace(text, inside, cache)]
        if from_hf_hub:
            hubs.reverse()
    for hub in hubs:
        path = hub.cached(CONFIG)
        if path is not None:
            note = "" if hub is hubs[0] else f"{text}: using the copy in the cache of {hub.label}"
            return Checkpoint(text, path, hub, note)
    parent = Path(text).parent
    if parent.name and parent.is_dir() and text not in RELEASED and not from_hf_hub and not from_aistudio:
        raise FileNotFoundError(
            f"{text}: no such directory, {_holds(parent)}; if a repository on a hub is meant, give from_hf_hub=True "
            "(--from-hf-hub)"
        )
    reasons: list[str] = []
    for hub in hubs:
        try:
            path = hub.fetch(CONFIG)
        except HubError as error:
            reasons.append(f"{hub.label}: {error}")
            continue
        if path is not None:
            note = f"{text}: {reasons[0]}; taking it from {hub.label}" if reasons else ""
            return Checkpoint(text, path, hub, note)
        reasons.append(f"{hub.label} has no such repository")
    raise HubError(f"{text} is no directory here, and no hub has it. " + ". ".join(reasons))


def _is_path(name: str | os.PathLike[str]) -> bool:
    """Whether it cannot be a hub's name, which is a word or two with one separator between them."""
    text = os.fspath(name)
    return (
        not isinstance(name, str)
        or os.path.isabs(text)
        or text.startswith(("./", "../", "~", "\\"))
        or ".." in Path(text).parts
        or text.count("/") > 1
        or text.endswith("/")
        or not text.strip()
    )


def _holds(directory: Path) -> str:
    """What lies in a directory, in a few words."""
    names = sorted(path.name for path in directory.iterdir() if path.is_dir())
    return f"{directory} holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "its parent is"


def _shards(index: Path) -> list[str]:
    names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}: a shard lies beside its index")
    return names


def _download(url: str, target: Path) -> bool:
    """Fetch `url` into `target`; False when the server has no such file.

    What has arrived lies beside the target under a name that is tied to the server's version of the file, and becomes
    the target only when it is whole; a later call goes on where the last one stopped. Raises HubError.
    """
    head = _head(url)
    if head is None:
        return False
    size = int(head.headers["Content-Length"]) if "Content-Length" in head.headers else None
    version = hashlib.sha256(f"{head.headers.get('ETag')} {size}".encode()).hexdigest()[:12]
    partial = target.with_name(f"{target.name}.{version}.incomplete")
    for stale in target.parent.glob(f"{target.name}.*.incomplete"):
        if stale != partial:
            stale.unlink()
    if size is not None and shutil.disk_usage(target.parent).free < size - _arrived(partial):
        raise HubError(f"{target.name} takes {size:,} bytes; {target.parent} has not that much room")
    tries = _TRIES
    while True:
        before = _arrived(partial)
        try:
            _transfer(url, partial, size)
            break
        except (requests.RequestException, HubError) as error:
            tries = tries - 1 if _arrived(partial) == before else _TRIES - 1
            if tries <= 0:
                raise HubError(
                    f"the transfer of {target.name} broke off after {_arrived(partial):,} of {size or '?':,} bytes "
                    f"({_first_line(error)}); what has arrived is kept, call again to go on"
                ) from error
            time.sleep(_PAUSE)
    os.replace(partial, target)
    return True


def _transfer(url: str, partial: Path, size: int | None) -> None:
    """One request for what is still missing; returns when the file is whole."""
    start = _arrived(partial)
    if size is not None and start == size > 0:
        return
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        resumed = response.status_code == 206
        with (
            open(partial, "ab" if resumed else "wb") as file,
            tqdm(
                total=size,
                initial=start if resumed else 0,
                unit="B",
                unit_scale=True,
                desc=partial.name.rsplit(".", 2)[0],
            ) as progress,
        ):
            for piece in response.iter_content(_PIECE):
                file.write(piece)
                progress.update(len(piece))
    if size is not None and _arrived(partial) != size:
        raise HubError(f"the server closed the connection after {_arrived(partial):,} of {size:,} bytes")


def _head(url: str) -> requests.Response | None:
    """What the server says about a file; None when it has none (object stores may say 403 then). Raises HubError."""
    try:
        response = requests.head(url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=_TIMEOUT)
        if response.status_code in (403, 404):
            return None
        response.raise_for_status()
        return response
    except requests.HTTPError as error:
        raise HubError(_first_line(error)) from error
    except requests.RequestException as error:
        raise HubError(f"cannot be reached: {_first_line(error)}") from error


def _arrived(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _first_line(error: BaseException) -> str:
    """What happened; of a connection that failed, the reason alone, without the URL and the tries."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    text = str(error) if reason is None else str(reason).rsplit("): ", 1)[-1]
    return (text or type(error).__name__).strip().splitlines()[0]
