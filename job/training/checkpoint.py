"""A run's progress to files and back.

A checkpoint is a folder ``step-000350-1f3a9c`` in the run's ``checkpoints/``: ``model.safetensors``,
``optimizer.safetensors``, ``progress.json``, ``vocabulary.json``, ``config.toml``, and for each worker
``lanes-00000-00015.safetensors`` with its lanes' state. The workers write these parts; the driver
alone, when it has the receipts of all, writes ``manifest.json`` with their sizes and checksums.
Without a sound manifest there is no checkpoint. The folder's last part is the attempt that wrote
it, so that what a dead attempt left can mix with nothing.

Nothing that is read here is executed, and sizes and names are checked before memory is taken.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from job.config.schema import Config
from job.config.toml import config_from_toml, config_to_toml
from job.data.vocabulary import Vocabulary, vocabulary_from_json
from job.errors import UserError
from job.nn.state import State
from job.storage import Folder, TooLarge
from job.training.progress import LossSum, Progress

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 16 << 20  # bytes; a hundred bytes for each worker's part
_NAME = re.compile(r"step-(\d{6,})-([0-9a-f]{6,32})")
_LANES = re.compile(r"lanes-(\d{5,})-(\d{5,})\.safetensors")
_FILE = re.compile(r"[a-z]+[a-z0-9-]*\.(safetensors|json|toml)")


class CorruptCheckpoint(ValueError):
    """A checkpoint that is torn, changed or foreign; the text says what is wrong with it.

    One that cannot be read just now (a store that does not answer, a right that is missing) is an
    OSError instead, and one of another format a UserError: nothing is passed over for them.
    """


@dataclass(frozen=True)
class PartReceipt:
    """A part that is on the disk: file names with (bytes, SHA-256)."""

    checkpoint: str
    workers: int
    files: dict[str, tuple[int, str]]
    progress: dict[str, Any] | None  # rank 0's alone


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, by its manifest."""

    folder: Folder
    name: str
    step: int
    files: dict[str, tuple[int, str]]
    validation_nats: float | None


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds beside its lanes."""

    config: Config
    vocabulary: Vocabulary
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: Progress
    metadata: dict[str, Any]  # precision, and the corpus's fingerprint


def checkpoint_name(step: int, attempt: str) -> str:
    """The folder's name of a checkpoint."""
    return f"step-{step:06d}-{attempt}"


# --- writing ----------------------------------------------------------------------------------


def serialize_lane_state(lanes: range, state: State) -> dict[str, bytes]:
    """The file with some lanes' state; no file where the state is zero."""
    if state is None:
        return {}
    parts = state if isinstance(state, tuple) else (state,)
    tensors = {f"state.{index}": part.contiguous() for index, part in enumerate(parts)}
    kind = {"kind": "tuple" if isinstance(state, tuple) else "tensor"}
    name = f"lanes-{lanes.start:05d}-{lanes.stop - 1:05d}.safetensors"
    return {name: save_safetensors(tensors, kind)}


def serialize_model(
    config: Config,
    vocabulary: Vocabulary,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    progress: Progress,
    metadata: dict[str, Any],
) -> dict[str, bytes]:
    """The files that one worker writes for all."""
    return {
        "model.safetensors": save_safetensors(weights),
        "optimizer.safetensors": save_safetensors(optimizer),
        "progress.json": json.dumps({**asdict(progress), **metadata}, indent=1).encode(),
        "vocabulary.json": vocabulary.to_json().encode(),
        "config.toml": config_to_toml(config).encode(),
    }


def write_part(
    folder: Folder, name: str, files: dict[str, bytes], workers: int, progress: Progress | None
) -> PartReceipt:
    """Writes a worker's files into the checkpoint; the receipt is the driver's to commit."""
    place = folder / name
    for file, data in files.items():
        place.write(file, data)
    sums = {file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()}
    return PartReceipt(name, workers, sums, asdict(progress) if progress else None)


def commit_checkpoint(folder: Folder, name: str, receipts: Iterable[PartReceipt]) -> Checkpoint:
    """Makes the parts a checkpoint, all or nothing."""
    receipts = list(receipts)
    files = {file: metadata for receipt in receipts for file, metadata in receipt.files.items()}
    progress = next(receipt.progress for receipt in receipts if receipt.progress)
    content = {
        "format": FORMAT,
        "step": progress["step"],
        # The validation of these very weights, if there was one.
        "validation_nats": progress["last_validation_nats"] if progress["validated_step"] == progress["step"] else None,
        "files": {file: {"bytes": size, "sha256": digest} for file, (size, digest) in sorted(files.items())},
    }
    (folder / name).write(MANIFEST, json.dumps({"content": content, "sha256": _digest(content)}, indent=1).encode())
    return Checkpoint(folder, name, progress["step"], files, content["validation_nats"])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_checkpoint(found: Checkpoint) -> None:
    """Removes a checkpoint, its manifest first, so that what is left is never taken for whole."""
    (found.folder / found.name).remove(MANIFEST)
    found.folder.remove(found.name)


def discard_after(folder: Folder, step: int, attempt: str) -> None:
    """Makes room for a group of workers, ``attempt``, that goes on from ``step``.

    Later checkpoints go, since it writes them again, and so do the parts of those that were never
    committed. What it has already begun to write stays.
    """
    for name in folder.names():
        match = _NAME.fullmatch(name)
        if match and match[2] != attempt and (int(match[1]) > step or not (folder / name).has(MANIFEST)):
            (folder / name).remove(MANIFEST)
            folder.remove(name)


# --- reading ----------------------------------------------------------------------------------


def list_checkpoints(folder: Folder) -> list[Checkpoint | str]:
    """Checkpoints with a sound manifest, the latest last; a text for each unsound one.

    OSError where they cannot be read; UserError for one of another format.
    """
    found: list[Checkpoint | str] = []
    for name in sorted(folder.names(), key=_step_of_name):
        if _NAME.fullmatch(name) and (folder / name).has(MANIFEST):
            try:
                found.append(read_manifest(folder, name))
            except CorruptCheckpoint as error:
                found.append(str(error))
    return found


def _step_of_name(name: str) -> tuple[int, str]:
    match = _NAME.fullmatch(name)
    return (int(match[1]) if match else -1, name)


def read_manifest(folder: Folder, name: str) -> Checkpoint:
    """The checkpoint that a manifest describes; Unsound where it is none."""
    place = folder / name
    try:
        document = json.loads(place.read(MANIFEST, _MAX_MANIFEST_BYTES))
        content = document["content"]
        if document["sha256"] != _digest(content):
            raise CorruptCheckpoint(f"{place}: the manifest is damaged")
        if content["format"] != FORMAT:
            raise UserError(
                f"{place}: of format {content['format']!r}, and this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        files = {file: (metadata["bytes"], metadata["sha256"]) for file, metadata in content["files"].items()}
        step, nats = content["step"], content["validation_nats"]
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{place}: not a checkpoint, it has no {MANIFEST}") from None
    except (CorruptCheckpoint, UserError):
        raise
    except (TooLarge, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CorruptCheckpoint(f"{place}: the manifest is damaged") from None
    sound = type(step) is int and (nats is None or type(nats) is float)
    for file, (size, digest) in files.items():
        sound = sound and bool(_FILE.fullmatch(file)) and type(size) is int and type(digest) is str
    if not sound:
        raise CorruptCheckpoint(f"{place}: the manifest is not one of ours")
    return Checkpoint(folder, name, step, files, nats)


def read_checkpoint_file(checkpoint: Checkpoint, file: str) -> bytes:
    """A file of the checkpoint, of the size and checksum that the manifest tells; else Unsound."""
    place = checkpoint.folder / checkpoint.name
    if file not in checkpoint.files:
        raise CorruptCheckpoint(f"{place}: lacks {file}")
    size, digest = checkpoint.files[file]
    try:
        data = place.read(file, size)
    except (FileNotFoundError, TooLarge) as error:
        raise CorruptCheckpoint(f"{place / file}: cannot be read: {error}") from None
    if len(data) != size:
        raise CorruptCheckpoint(f"{place / file}: truncated, {len(data)} of {size} bytes")
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptCheckpoint(f"{place / file}: damaged, its checksum is not the manifest's")
    return data


def verify_checkpoint(checkpoint: Checkpoint) -> LoadedCheckpoint:
    """As ``restore``; Unsound also unless every lane's file is there as the manifest tells."""
    loaded = load_checkpoint(checkpoint)
    for file in filter(_LANES.fullmatch, checkpoint.files):
        read_checkpoint_file(checkpoint, file)
    return loaded


def copy_checkpoint(checkpoint: Checkpoint, folder: Folder) -> Checkpoint:
    """The same checkpoint, byte for byte, in another folder; whole or not there."""
    place = folder / checkpoint.name
    manifest = (checkpoint.folder / checkpoint.name).read(MANIFEST, _MAX_MANIFEST_BYTES)
    for file in checkpoint.files:
        place.write(file, read_checkpoint_file(checkpoint, file))
    place.write(MANIFEST, manifest)
    return read_manifest(folder, checkpoint.name)


def parse_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file; Unsound where it is none."""
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise CorruptCheckpoint(f"{where}: not a safetensors file: {error}") from None


def load_checkpoint(checkpoint: Checkpoint) -> LoadedCheckpoint:
    """What the checkpoint holds, but for the lanes; Unsound where anything is not as it must be."""
    place = str(checkpoint.folder / checkpoint.name)
    try:
        options = config_from_toml(read_checkpoint_file(checkpoint, "config.toml").decode(), f"{place}/config.toml")
        vocabulary = vocabulary_from_json(
            read_checkpoint_file(checkpoint, "vocabulary.json"), f"{place}/vocabulary.json"
        )
    except (UserError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(str(error)) from None
    progress, metadata = _progress(read_checkpoint_file(checkpoint, "progress.json"), place)
    return LoadedCheckpoint(
        options,
        vocabulary,
        parse_safetensors(read_checkpoint_file(checkpoint, "model.safetensors"), f"{place}/model.safetensors"),
        parse_safetensors(read_checkpoint_file(checkpoint, "optimizer.safetensors"), f"{place}/optimizer.safetensors"),
        progress,
        metadata,
    )


def _progress(data: bytes, place: str) -> tuple[Progress, dict[str, Any]]:
    try:
        found = json.loads(data)
        means = {name: LossSum(**found.pop(name)) for name in ("epoch_mean", "report_mean")}
        own = {name: found.pop(name) for name in asdict(Progress()) if name not in means}
        own |= means
        return Progress(**own), found
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise CorruptCheckpoint(f"{place}/progress.json: not a record of progress") from None


def load_lane_state(checkpoint: Checkpoint, lanes: range) -> State:
    """The state of some lanes, put together from whichever workers wrote them; on the CPU."""
    try:
        return _load_lane_state(checkpoint, lanes)
    except (LookupError, TypeError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{checkpoint.folder / checkpoint.name}: holds no state of lanes: {error}") from None


def _load_lane_state(checkpoint: Checkpoint, lanes: range) -> State:
    place = checkpoint.folder / checkpoint.name
    held = sorted((int(m[1]), int(m[2]) + 1, m[0]) for m in map(_LANES.fullmatch, checkpoint.files) if m)
    if not held:
        return None
    pieces: list[dict[str, Tensor]] = []
    kind, covered = "tensor", lanes.start
    for first, stop, file in held:
        begin, end = max(first, lanes.start), min(stop, lanes.stop)
        if begin >= end:
            continue
        data = read_checkpoint_file(checkpoint, file)
        parts = parse_safetensors(data, str(place / file))
        if begin != covered or any(part.dim() < 2 or part.shape[1] != stop - first for part in parts.values()):
            raise CorruptCheckpoint(f"{place / file}: does not hold the state of lanes {first} to {stop - 1}")
        pieces.append({name: part.narrow(1, begin - first, end - begin) for name, part in parts.items()})
        kind, covered = _state_kind(data), end
    if covered != lanes.stop or any(piece.keys() != pieces[0].keys() for piece in pieces):
        raise CorruptCheckpoint(f"{place}: lacks the state of lane {covered}")
    joined = [torch.cat([piece[f"state.{index}"] for piece in pieces], 1) for index in range(len(pieces[0]))]
    return tuple(joined) if kind == "tuple" else joined[0]


def _state_kind(data: bytes) -> str:
    """Whether the state was a tuple; the file's header, which safetensors has checked, says so."""
    size = int.from_bytes(data[:8], "little")
    return cast(str, json.loads(data[8 : 8 + size])["__metadata__"]["kind"])


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over name, shape and bytes (little-endian, row by row) of each weight, by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_latest_valid(folder: Folder) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The last checkpoint of which every byte is right, and what is wrong with any after it."""
    skipped_checkpoints: list[str] = []
    for found in reversed(list_checkpoints(folder)):
        if isinstance(found, str):
            skipped_checkpoints.append(found)
            continue
        try:
            verify_checkpoint(found)
        except CorruptCheckpoint as error:
            skipped_checkpoints.append(str(error))
        else:
            return found, tuple(skipped_checkpoints)
    return None, tuple(skipped_checkpoints)


def raise_if_all_corrupt(folder: Folder, skipped_checkpoints: tuple[str, ...]) -> None:
    """Unsound where all that a run has is damaged: to start anew, and over it, is for a person to decide."""
    if skipped_checkpoints:
        raise CorruptCheckpoint(
            f"{folder}: no checkpoint is sound: {skipped_checkpoints[0]}; to start anew remove the folder"
        )
