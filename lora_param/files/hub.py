"""`hf://owner/name[@revision][/inside]`: what the Hub's cache on this machine has of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

from lora_param.errors import BrokenFileError, MissingFileError, MissingPackageError

__all__ = ["find_cached"]

_REPOSITORY = re.compile(
    r"hf://(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<inside>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp")
_SECONDS = 10  # that the Hub has to answer in


def find_cached(url: str) -> Path | str:
    """The path in the cache; where that does not have all of it, a URL of the commit to read from.

    The Hub is asked which commit a branch or a tag is at. If it cannot be, the one that the cache
    knows counts.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        MissingFileError: the Hub does not have it.
        BrokenFileError: the Hub cannot be asked, and the cache does not have it.
    """
    match = _REPOSITORY.fullmatch(url)
    if match is None or match["id"].startswith(("datasets/", "spaces/", "buckets/")):
        return url
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import (
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise MissingPackageError(url, "huggingface_hub", "lora_param[hub]") from None
    repository, inside = match["id"], match["inside"] or ""
    revision = unquote(match["revision"] or "main")
    try:
        known = _in_cache(repository, revision, inside)
    except HFValidationError as error:
        raise BrokenFileError(url, str(error).rstrip(".")) from None
    if known is not None and _COMMIT.fullmatch(revision):
        return known
    try:
        commit = HfApi().repo_info(repository, revision=revision, timeout=_SECONDS).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if known is None:
            what = "a public repository and revision of the Hub, or one of yours (hf auth login)"
            raise MissingFileError(url, what) from error
        return known
    except Exception as error:
        # Of the network there are as many exceptions as libraries below huggingface_hub.
        if known is None:
            reason = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
            raise BrokenFileError(
                url,
                f"it is not in the cache {HF_HUB_CACHE}, and the Hub cannot be asked ({reason})",
            ) from error
        return known
    there = f"hf://{repository}@{commit}" + (f"/{inside}" if inside else "")
    return _in_cache(repository, str(commit), inside) or there


def _in_cache(repository: str, revision: str, inside: str) -> Path | None:
    """The path in the cache, where all that is asked for is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    path = Path(folder, inside)
    return path if _is_whole(path) else None


def _is_whole(path: Path) -> bool:
    """A file, or a directory with weights and every shard that its indices name."""
    if not path.is_dir():
        return path.is_file()
    names = {p.name for p in path.iterdir() if p.is_file()}
    indices = [name for name in names if name.endswith(".index.json")]
    shards = {shard for name in indices for shard in _shards(path / name)}
    return any(name.endswith(_WEIGHTS) for name in names) and shards <= names


def _shards(index: Path) -> set[str]:
    """The files that an index names; of one that cannot be read, whoever opens it tells."""
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(shard) for shard in mapping.values()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return set()
