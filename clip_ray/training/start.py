"""How a run begins: with a tokenizer, and with nothing else, or from what another run has made."""

from __future__ import annotations

import json
from collections.abc import Callable

from clip_ray.config import Config
from clip_ray.data.shards import Manifest, read_column
from clip_ray.data.tokenizer import CaptionTokenizer, make_tokenizer
from clip_ray.errors import RunError
from clip_ray.model.pretrained import TOKENIZER, read_file
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import (
    CheckpointManifest,
    Checkpoints,
    check_identity,
    folder_of,
    new_manifest,
)
from clip_ray.training.ledger import Entry
from clip_ray.training.run import TOKENIZER_KEY, run_identity

# A fork may change these, but for which parameters there are and which of them are trained; without
# all else its state would have no meaning.
MAY_DIFFER = ("optim", "loss", "train.epochs")


def begin(
    config: Config, manifest: Manifest, owner: str, say: Callable[[str], None]
) -> CaptionTokenizer:
    """The run's tokenizer, kept with the run; a fork's state too. Called by the lease's holder.

    Raises RunError where what `start` names is not there, or does not fit.
    """
    run = Storage(config.run_root)
    new = Checkpoints(run).newest() is None
    if not run.exists(TOKENIZER_KEY):
        run.write_bytes(TOKENIZER_KEY, _tokenizer_json(config, manifest).encode())
    json_text = run.read_bytes(TOKENIZER_KEY).decode()
    tokenizer = CaptionTokenizer(json_text, config.model.text.context_length)
    if new and config.start.fork is not None:
        source, step = _source(config)
        _fork(config, source, step, run_identity(config, manifest, tokenizer), owner)
        say(f"train: {config.name} begins with the state of {config.start.fork}")
    return tokenizer


def _tokenizer_json(config: Config, manifest: Manifest) -> str:
    """That of what the run starts from; else made from the captions of the train split."""
    if config.start.weights is not None:
        return read_file(config.start.weights, TOKENIZER).decode()
    if config.start.fork is not None:
        return Storage(_source(config)[0]).read_bytes(TOKENIZER_KEY).decode()
    groups = read_column(Storage(config.data_root), manifest.splits["train"], "captions")
    captions = (caption for group in groups for caption in group)
    return make_tokenizer(config.model.text, captions).json_text


def _source(config: Config) -> tuple[str, int | None]:
    """The root of the run that is forked, and its step; None for the newest."""
    place, _, step = (config.start.fork or "").rpartition("@")
    if not place:
        place, step = step, ""
    root = place if place.startswith("s3://") else f"{config.storage.root}/runs/{place}"
    return root, int(step) if step else None


def _fork(
    config: Config, root: str, step: int | None, identity: dict[str, str], owner: str
) -> None:
    """Copies a checkpoint of another run into this one, as its first."""
    source, run = Storage(root), Storage(config.run_root)
    theirs, ours = Checkpoints(source), Checkpoints(run)
    with theirs.ledger.pinned(step) as entry:
        found = theirs.manifest(entry)
        theirs_fixed = found.model_copy(update={"identity": _fixed(found.identity)})
        check_identity(theirs_fixed, _fixed(identity))
        _copy(found, entry, source, ours, identity, owner)


def _fixed(identity: dict[str, str]) -> dict[str, str]:
    """What a fork has in common with the run that it comes from."""
    loss, optim = (json.loads(identity[field]) for field in ("loss", "optim"))
    return {field: value for field, value in identity.items() if field not in MAY_DIFFER} | {
        "loss.kind": loss["kind"],
        "loss.learn_temperature": str(loss["learn_temperature"]),
        "optim.image.trained_groups": str(optim["image"]["trained_groups"]),
        "optim.text.trained_groups": str(optim["text"]["trained_groups"]),
    }


def _copy(
    found: CheckpointManifest,
    entry: Entry,
    source: Storage,
    ours: Checkpoints,
    identity: dict[str, str],
    owner: str,
) -> None:
    attempt = ours.ledger.begin_attempt(owner)
    folder = folder_of(found.step, attempt)
    files = []
    for file in found.files:
        copied = ours.write_file(
            folder, file.name, source.read_bytes(f"{entry.folder}/{file.name}")
        )
        if copied.sha256 != file.sha256:
            raise RunError(f"{source.uri(entry.folder)}/{file.name}: is damaged")
        files.append(copied)
    manifest = new_manifest(found.step, found.epoch, found.metrics, identity, files)
    ours.commit(owner, attempt, folder, manifest)
