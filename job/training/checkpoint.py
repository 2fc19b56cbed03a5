"""The checkpoint format: writing, reading and verifying.

A checkpoint is a folder ``step-000350-1f3a9c`` in the run's ``checkpoints/``. It contains ``model.safetensors``,
``average.safetensors`` if the weights are averaged, ``optimizer.safetensors``, ``progress.json``, ``vocabulary.json``
(or ``tokenizer.json``), ``config.toml``, and for each worker ``lanes-00000-00015.safetensors`` with the state of its
lanes. Each worker writes its part of these files. Once the driver has the receipts of all workers, it commits the
checkpoint by writing ``manifest.json`` with the sizes and checksums of all files. A folder without a valid manifest is
not a checkpoint. Its name ends with the attempt that wrote it, so that parts of different attempts never mix.

Reading executes nothing, and checks names and sizes before it allocates memory.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from socket import gethostname
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor

from job.config.schema import Config
from job.config.toml import config_from_toml, config_to_toml
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_file import find_vocabulary, vocabulary_from_json
from job.documents import parse_record
from job.errors import UserError
from job.nn.state import State
from job.storage import Folder, TooLarge
from job.training.decisions import Decisions
from job.training.progress import LossSum, Progress, finite_or_none
from job.training.run_spec import RunSpec
from job.training.tensor_file import CHUNK_BYTES, ReadableInto, read_bytes, read_tensors, tensor_bytes, tensor_file

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")
FileContents = dict[str, list[bytes | memoryview]]  # by name: the parts of a file, which are written one by one

FORMAT = 1
MANIFEST = "manifest.json"
AVERAGE_FILE = "average.safetensors"
_MAX_MANIFEST_BYTES = 16 << 20  # at some hundred bytes per worker
_NAME = re.compile(r"step-(\d{6,})-([0-9a-f]{6,32})")
_LANES = re.compile(r"lanes-(\d{5,})-(\d{5,})\.safetensors")
_FILE = re.compile(r"[a-z]+[a-z0-9-]*\.(safetensors|json|toml)")
_PROGRESS_TYPES: dict[str, Any] = {"precision": str} | {
    name: (float, int, NoneType) if value is None or type(value) is float else type(value)
    for name, value in asdict(Progress()).items()
    if name not in ("averaged_steps", "decisions")  # early versions did not store them
}
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class CorruptCheckpoint(UserError):
    """A checkpoint that is incomplete, damaged or not of this program.

    Temporary failures (a storage timeout, missing permissions) raise OSError, and an unknown format version raises
    another UserError. Callers must not skip a checkpoint for either.

    Args:
        path: the checkpoint's folder
        reason: what is wrong with it
    """

    def __init__(self, path: Folder, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.args = path, reason  # from which it is unpickled
        self.name, self.reason = path.name, reason


@dataclass(frozen=True)
class PartReceipt:
    """A worker's part of a checkpoint that is written and waits to be committed."""

    checkpoint: str
    workers: int  # number of parts of the checkpoint
    files: dict[str, tuple[int, str]]  # by name: bytes, SHA-256
    progress: Progress | None  # of rank 0 only
    host: str = field(default_factory=gethostname)  # of the worker


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as described by its manifest."""

    folder: Folder  # of all checkpoints
    name: str
    step: int
    files: dict[str, tuple[int, str]]  # by name: bytes, SHA-256
    validation_nats: float | None  # mean per token with these weights, if they were validated

    @property
    def path(self) -> Folder:
        """The checkpoint's own folder."""
        return self.folder / self.name


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What generation and evaluation need of a checkpoint."""

    checkpoint: Checkpoint
    config: Config
    vocabulary: Vocabulary
    weights: dict[str, Tensor]
    progress: Progress
    average: dict[str, Tensor] = field(default_factory=dict)  # of the weights; empty if they are not averaged

    def select_weights(self, choice: str = "auto") -> dict[str, Tensor]:
        """Returns the weights that ``evaluate.weights`` names. Raises UserError if there is no average of them."""
        if choice == "average" and not self.average:
            problem = f"evaluate.weights = average: {self.checkpoint.path} has no {AVERAGE_FILE}"
            raise UserError(problem, "set evaluate.weights = raw, or train with optimizer.averaging")
        return self.weights if choice == "raw" else self.average or self.weights


def checkpoint_name(step: int, attempt: str) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"step-{step:06d}-{attempt}"


# --- writing ----------------------------------------------------------------------------------


def serialize_lane_state(lanes: range, state: State) -> FileContents:
    """Returns the file with the state of these lanes; no file if the state is None, that is zero."""
    if state is None:
        return {}
    kind, state = ("tuple", state) if isinstance(state, tuple) else ("tensor", (state,))
    tensors = {f"state.{index}": tensor for index, tensor in enumerate(state)}
    name = f"lanes-{lanes.start:05d}-{lanes.stop - 1:05d}.safetensors"
    return {name: tensor_file(tensors, {"kind": kind})}


def serialize_model(
    spec: RunSpec, precision: str, progress: Progress, tensors: dict[str, dict[str, Tensor]]
) -> FileContents:
    """Returns the files that rank 0 writes for all workers.

    Args:
        spec: the run
        precision: of the run
        progress: of the run
        tensors: those of ``model``, its ``optimizer`` and perhaps its ``average``, by name and on the CPU
    """
    metadata = {"precision": precision, "corpus": spec.dataset.metadata}
    texts = {
        "progress.json": json.dumps({**asdict(progress), **metadata}, indent=1),
        spec.dataset.vocabulary.file_name: spec.dataset.vocabulary.to_json(),
        "config.toml": config_to_toml(spec.config),
    }
    files: FileContents = {file: [text.encode()] for file, text in texts.items()}
    return files | {f"{name}.safetensors": tensor_file(tensors[name]) for name in tensors}


def write_part(folder: Folder, name: str, files: FileContents, workers: int, progress: Progress | None) -> PartReceipt:
    """Writes a worker's part of a checkpoint, which the driver then commits by its receipt.

    Args:
        folder: the run's checkpoints
        name: name of the checkpoint
        files: the content of each file in parts, by its name
        workers: number of workers, each of which writes a part
        progress: the run's progress, given by rank 0 only
    """
    sums = {}
    for file, parts in files.items():
        (folder / name).write(file, *parts)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        sums[file] = sum(map(len, parts)), digest.hexdigest()
    return PartReceipt(name, workers, sums, progress)


def commit_checkpoint(folder: Folder, name: str, receipts: Iterable[PartReceipt]) -> Checkpoint:
    """Writes the manifest of a checkpoint whose parts are all written."""
    receipts = list(receipts)
    files = {file: entry for receipt in receipts for file, entry in receipt.files.items()}
    progress = next(receipt.progress for receipt in receipts if receipt.progress)
    nats = progress.last_validation_nats if progress.validated_step == progress.step else None
    content = {
        "format": FORMAT,
        "step": progress.step,
        "validation_nats": nats,
        "files": {file: {"bytes": size, "sha256": digest} for file, (size, digest) in sorted(files.items())},
    }
    manifest = {"content": content, "sha256": _digest(content)}
    (folder / name).write(MANIFEST, json.dumps(manifest, indent=1).encode())
    _logger.info("committed %s", name)
    return Checkpoint(folder, name, progress.step, files, nats)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_checkpoint(folder: Folder, name: str) -> None:
    """Removes a checkpoint, its manifest first, so that an interrupted removal leaves no valid checkpoint."""
    _logger.info("removing %s", name)
    (folder / name).remove(MANIFEST)
    folder.remove(name)


def discard_after(folder: Folder, step: int, attempt: str) -> None:
    """Prepares the folder for a worker group that resumes from a step.

    Removes later checkpoints, which the group will write again, and uncommitted parts of earlier attempts.

    Args:
        folder: the run's checkpoints
        step: the step that the group resumes from
        attempt: the group, whose own parts remain
    """
    for name in folder.names():
        match = _NAME.fullmatch(name)
        if match and match[2] != attempt and (int(match[1]) > step or not (folder / name).has(MANIFEST)):
            remove_checkpoint(folder, name)


# --- reading ----------------------------------------------------------------------------------


def list_checkpoints(folder: Folder) -> tuple[list[Checkpoint], list[CorruptCheckpoint]]:
    """Reads the manifests of a run's checkpoints.

    Returns:
        the checkpoints with a valid manifest and those with a corrupt one, each in the order of their steps

    Raises:
        OSError: a manifest cannot be read now
        UserError: a checkpoint has another format version
    """
    checkpoints, corrupt = [], []
    for name in sorted(folder.names(), key=_step_and_name):
        if _NAME.fullmatch(name) and (folder / name).has(MANIFEST):
            try:
                checkpoints.append(read_manifest(folder, name))
            except CorruptCheckpoint as error:
                corrupt.append(error)
    return checkpoints, corrupt


def last_step(folder: Folder) -> int | None:
    """Returns the step of the last checkpoint with a manifest, which is not read; None if the last three have none."""
    names = sorted(filter(_NAME.fullmatch, folder.names()), key=_step_and_name, reverse=True)
    return next((_step_and_name(name)[0] for name in names[:3] if (folder / name).has(MANIFEST)), None)


def _step_and_name(name: str) -> tuple[int, str]:
    match = _NAME.fullmatch(name)
    return (int(match[1]) if match else -1, name)


def read_manifest(folder: Folder, name: str) -> Checkpoint:
    """Reads a checkpoint's manifest; raises as ``list_checkpoints``, and CorruptCheckpoint."""
    path = folder / name
    try:
        document = json.loads(path.read(MANIFEST, _MAX_MANIFEST_BYTES))
        content = document["content"]
        if document["sha256"] != _digest(content):
            raise ValueError("checksum")
        version = content["format"]
        if version == FORMAT:
            return _checkpoint_from_manifest(folder, name, content)
    except FileNotFoundError:
        raise CorruptCheckpoint(path, f"has no {MANIFEST}") from None
    except (TooLarge, *_MALFORMED):
        raise CorruptCheckpoint(path, "the manifest is damaged") from None
    raise UserError(f"{path}: has format {version!r}, but this version reads {FORMAT}", "use the version that wrote it")


def _checkpoint_from_manifest(folder: Folder, name: str, content: dict[str, Any]) -> Checkpoint:
    files = {file: (entry["bytes"], entry["sha256"]) for file, entry in content["files"].items()}
    step, nats = content["step"], content["validation_nats"]
    has_valid_files = all(
        _FILE.fullmatch(file) and type(size) is int and type(digest) is str for file, (size, digest) in files.items()
    )
    if not (has_valid_files and type(step) is int and isinstance(nats, float | None)):
        raise ValueError("types")
    return Checkpoint(folder, name, step, files, nats and finite_or_none(nats))  # early versions stored NaN


class _HashedStream:
    """A stream of which the SHA-256 is known after it was read."""

    def __init__(self, stream: ReadableInto) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def readinto(self, buffer: memoryview, /) -> int:
        count = self.stream.readinto(buffer) or 0
        self.digest.update(buffer[:count])
        return count


def read_checkpoint_file(checkpoint: Checkpoint, file: str, parse: Callable[[ReadableInto, int], Result]) -> Result:
    """Returns what ``parse`` makes of a file of a checkpoint.

    Args:
        checkpoint: the checkpoint
        file: the file's name
        parse: reads a stream of the given size to its end

    Raises:
        CorruptCheckpoint: size or checksum are not those of the manifest, or the content is not valid
    """
    path = checkpoint.path
    if file not in checkpoint.files:
        raise CorruptCheckpoint(path, f"{file} is missing")
    expected_size, expected_digest = checkpoint.files[file]

    def read(stream: ReadableInto, size: int) -> tuple[Result, str]:
        if size < expected_size:
            raise CorruptCheckpoint(path, f"{file} is truncated: {size} of {expected_size} bytes")
        hashed = _HashedStream(stream)
        try:
            return parse(hashed, size), hashed.digest.hexdigest()
        except _MALFORMED as error:
            raise CorruptCheckpoint(path, f"{file} is not valid: {error}") from None

    try:
        result, digest = path.read_with(file, read, expected_size)
    except FileNotFoundError:
        raise CorruptCheckpoint(path, f"{file} is missing") from None
    except TooLarge:
        raise CorruptCheckpoint(path, f"{file} is larger than its {expected_size} bytes in the manifest") from None
    if digest != expected_digest:
        raise CorruptCheckpoint(path, f"{file} is damaged: its checksum differs from the manifest's")
    return result


def copy_checkpoint(checkpoint: Checkpoint, folder: Folder) -> Checkpoint:
    """Copies a checkpoint byte for byte into another folder, the manifest last."""
    path = folder / checkpoint.name
    manifest = checkpoint.path.read(MANIFEST, _MAX_MANIFEST_BYTES)
    for file in checkpoint.files:
        path.write(file, read_checkpoint_file(checkpoint, file, read_bytes))
    path.write(MANIFEST, manifest)
    return read_manifest(folder, checkpoint.name)


def load_checkpoint(checkpoint: Checkpoint) -> LoadedCheckpoint:
    """Reads what generation and evaluation need; raises CorruptCheckpoint if a file of it is not valid."""
    return LoadedCheckpoint(
        checkpoint,
        read_stored_config(checkpoint),
        read_vocabulary(checkpoint),
        read_checkpoint_file(checkpoint, "model.safetensors", read_tensors)[0],
        read_progress(checkpoint)[0],
        read_checkpoint_file(checkpoint, AVERAGE_FILE, read_tensors)[0] if AVERAGE_FILE in checkpoint.files else {},
    )


def _read_small_file(checkpoint: Checkpoint, file: str, parse: Callable[[bytes], Result]) -> Result:
    return read_checkpoint_file(checkpoint, file, lambda stream, size: parse(read_bytes(stream, size)))


def read_stored_config(checkpoint: Checkpoint) -> Config:
    """Reads ``config.toml`` alone."""
    return _read_small_file(checkpoint, "config.toml", lambda data: config_from_toml(data.decode(), "config.toml"))


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Reads ``vocabulary.json`` or ``tokenizer.json`` alone."""
    name = find_vocabulary(checkpoint.files) or Vocabulary.file_name
    return _read_small_file(checkpoint, name, lambda data: vocabulary_from_json(data, name))


def verify_checkpoint(checkpoint: Checkpoint, files: Iterable[str] | None = None) -> Checkpoint:
    """Compares sizes and checksums of these files, or all, in constant memory. Returns the checkpoint."""
    for file in checkpoint.files if files is None else files:
        read_checkpoint_file(checkpoint, file, _read_to_the_end)
    return checkpoint


def _read_to_the_end(stream: ReadableInto, _: int) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while stream.readinto(buffer):
        pass


def read_progress(checkpoint: Checkpoint) -> tuple[Progress, dict[str, Any]]:
    """Reads ``progress.json`` alone: the progress, and the metadata (``precision``, ``corpus``)."""
    return _read_small_file(checkpoint, "progress.json", _parse_progress)


def _parse_progress(data: bytes) -> tuple[Progress, dict[str, Any]]:
    metadata = parse_record(data, _PROGRESS_TYPES, lambda _: None)  # early versions stored NaN
    values = {name: metadata.pop(name, default) for name, default in asdict(Progress()).items()}
    values["averaged_steps"] = int(values["averaged_steps"])
    values["decisions"] = Decisions.from_record(values["decisions"])
    for name in ("epoch_mean", "report_mean"):
        values[name] = LossSum(float(values[name]["nats"]), int(values[name]["tokens"]))
    return Progress(**values), metadata


def load_lane_state(checkpoint: Checkpoint, lanes: range) -> State:
    """Returns the state of these lanes on the CPU, assembled from the parts of any number of workers."""
    try:
        return _load_lane_state(checkpoint, lanes)
    except (LookupError, TypeError, RuntimeError) as error:
        raise CorruptCheckpoint(checkpoint.path, f"the state of the lanes is not valid: {error}") from None


def _load_lane_state(checkpoint: Checkpoint, lanes: range) -> State:
    stored = sorted((int(m[1]), int(m[2]) + 1, m[0]) for m in map(_LANES.fullmatch, checkpoint.files) if m)
    if not stored:
        return None
    pieces: list[dict[str, Tensor]] = []
    kind, covered = "tensor", lanes.start
    for first, stop, file in stored:
        begin, end = max(first, lanes.start), min(stop, lanes.stop)
        if begin >= end:
            continue
        tensors, metadata = read_checkpoint_file(checkpoint, file, read_tensors)
        if begin != covered or any(part.dim() < 2 or part.shape[1] != stop - first for part in tensors.values()):
            raise CorruptCheckpoint(checkpoint.path, f"{file} does not hold the state of lanes {first} to {stop - 1}")
        pieces.append({name: part.narrow(1, begin - first, end - begin) for name, part in tensors.items()})
        kind, covered = metadata["kind"], end
    if covered != lanes.stop or any(piece.keys() != pieces[0].keys() for piece in pieces):
        raise CorruptCheckpoint(checkpoint.path, f"the state of lane {covered} is missing")
    joined = [torch.cat([piece[f"state.{index}"] for piece in pieces], 1) for index in range(len(pieces[0]))]
    return tuple(joined) if kind == "tuple" else joined[0]


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, shapes and bytes (little-endian, row-major) of weights, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].cpu()
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def find_latest_valid(folder: Folder) -> tuple[Checkpoint | None, tuple[CorruptCheckpoint, ...]]:
    """Returns the last checkpoint of which every byte is valid; otherwise like ``load_latest``."""
    return load_latest(*list_checkpoints(folder), verify_checkpoint)


def load_latest(
    checkpoints: list[Checkpoint], corrupt: list[CorruptCheckpoint], load: Callable[[Checkpoint], Result]
) -> tuple[Result | None, tuple[CorruptCheckpoint, ...]]:
    """Loads the last checkpoint that is valid; raises as ``list_checkpoints``, whose results are the first arguments.

    Returns:
        what ``load`` returns for it, or None if there is none; and the corrupt checkpoints after it, the latest first
    """
    entries: list[Checkpoint | CorruptCheckpoint] = [*checkpoints, *corrupt]
    skipped: list[CorruptCheckpoint] = []
    for entry in sorted(entries, key=lambda entry: _step_and_name(entry.name), reverse=True):
        try:
            if isinstance(entry, CorruptCheckpoint):
                raise entry
            return load(entry), tuple(skipped)
        except CorruptCheckpoint as error:
            skipped.append(error)
    return None, tuple(skipped)
