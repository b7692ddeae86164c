"""How a run begins: with a tokenizer, and with nothing else, or from what another run has made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

from safetensors.torch import load, save

from clip_ray.config import Config
from clip_ray.data.shards import Manifest, read_column
from clip_ray.data.tokenizer import CaptionTokenizer, make_tokenizer
from clip_ray.errors import RunError
from clip_ray.model.weights_folder import TOKENIZER, read_file
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
    text, data = config.model.text, Storage(config.data_root)
    if text.tokenizer is not None:
        return make_tokenizer(text, ()).json_text
    # Kept with the data, for the other runs on it.
    key = f"tokenizers/{manifest.sha256}-{text.vocab_size}.json"
    if not data.exists(key):
        groups = read_column(data, manifest.splits["train"], "captions")
        captions = (caption for group in groups for caption in group)
        data.write_bytes(key, make_tokenizer(text, captions).json_text.encode())
    return data.read_bytes(key).decode()


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
        _copy(found, entry, source, ours, identity, owner, _new_scale(config, found))


def _fixed(identity: dict[str, str]) -> dict[str, str]:
    """What a fork has in common with the run that it comes from."""
    loss, optim = (json.loads(identity[field]) for field in ("loss", "optim"))
    return {field: value for field, value in identity.items() if field not in MAY_DIFFER} | {
        "loss.kind": loss["kind"],
        "loss.learn_temperature": str(loss["learn_temperature"]),
        "optim.image.trained_groups": str(optim["image"]["trained_groups"]),
        "optim.text.trained_groups": str(optim["text"]["trained_groups"]),
    }


def _new_scale(config: Config, found: CheckpointManifest) -> float | None:
    """The logit_scale of a fork that is given another temperature; None where it stays."""
    temperature = config.loss.temperature
    differs = json.loads(found.identity["loss"])["temperature"] != temperature
    return math.log(1 / temperature) if differs else None


def _copy(
    found: CheckpointManifest,
    entry: Entry,
    source: Storage,
    ours: Checkpoints,
    identity: dict[str, str],
    owner: str,
    new_scale: float | None,
) -> None:
    attempt = ours.ledger.begin_attempt(owner)
    folder = folder_of(found.step, attempt)
    files = []
    for file in found.files:
        data = source.read_bytes(f"{entry.folder}/{file.name}")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise RunError(f"{source.uri(entry.folder)}/{file.name}: is damaged")
        if new_scale is not None and file.name.endswith(".safetensors"):
            data = _with_scale(data, new_scale)
        files.append(ours.write_file(folder, file.name, data))
    manifest = new_manifest(found.step, found.epoch, found.metrics, identity, files)
    ours.commit(owner, attempt, folder, manifest)


def _with_scale(part: bytes, scale: float) -> bytes:
    """A part of the state with this logit_scale, of which AdamW remembers nothing."""
    tensors = load(part)
    for name, tensor in tensors.items():
        kind, _, place = name.partition("/")
        if place.partition("@")[0] == "logit_scale":
            tensor.fill_(scale if kind in ("param", "ema", "buffer") else 0.0)
    return save(tensors)
