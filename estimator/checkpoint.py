"""A checkpoint directory: written under a temporary name, then renamed; loaded only if every hash matches. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from depo_gateway.estimator.finite import NotFiniteError, check_numbers, check_onnx, check_weights
from depo_gateway.estimator.heads import ORIGINAL
from depo_gateway.estimator.text import TextConfig

MANIFEST_SCHEMA = 2  # the newest that this version reads
PLAIN_SCHEMA = 1  # of a checkpoint without groups and centres, which earlier versions read as well
MANIFEST, WEIGHTS, TOKENIZER, ENCODER, CALIBRATION = (
    "manifest.json", "model.safetensors", "tokenizer.json", "model.onnx", "calibration.json",
)  # fmt: skip
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # excludes "", ".." and paths
FILES = (WEIGHTS, TOKENIZER, ENCODER, CALIBRATION)
KIND = ("wide", "trunk", "rounded")  # fields of Base; a manifest without them means their defaults
BUILTIN = Path(__file__).parent / "builtin"


@dataclass(frozen=True, slots=True)
class Base:
    """The encoder of a checkpoint. `trained` names its tensors that are stored; the others come from `encoder`."""

    encoder: str  # a Hugging Face name, or a directory
    layers: int  # of the encoder's layers, the first so many
    trained: tuple[str, ...] = ()
    wide: bool = True  # without it there is no cheap stage
    trunk: bool = False  # on the encoder: DEPO's trunk, or linear heads
    rounded: bool = True  # whether tensors not in `trained` were rounded to int8
    groups: tuple[str, ...] = ()  # names of tasks with weights of their own
    centres: int = 0  # of fitted prompts, in the weights (similarity.py); no text


@dataclass(frozen=True, slots=True)
class Manifest:
    version: str
    parent: str | None
    created: str  # ISO 8601, UTC
    base: Base
    pools: tuple[str, ...]  # cheapest first
    text: TextConfig
    metrics: Mapping[str, Any]
    files: Mapping[str, str]  # name -> sha256
    schema: int = PLAIN_SCHEMA
    heads: tuple[str, ...] = ORIGINAL  # in the order of the model's outputs; the file names them if they are not these


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_checkpoint(
    directory: Path,
    files: Mapping[str, bytes],
    base: Base,
    pools: tuple[str, ...],
    text: TextConfig,
    metrics: Mapping[str, Any],
    parent: str | None = None,
    heads: tuple[str, ...] = ORIGINAL,
) -> Manifest:
    """Write a checkpoint atomically.

    Raises:
        NotFiniteError: a weight or a number of the calibration is NaN or infinite, as after a diverged training.
        ValueError: the directory is taken, or a file is not what its name says.
    """
    missing = set(FILES) - set(files)
    assert not missing, f"a checkpoint needs {missing}"
    ensure_free(directory)
    check_finite(files)
    now = datetime.now(UTC)
    hashes = {name: sha256(data) for name, data in sorted(files.items())}
    version = f"{now:%Y%m%d-%H%M%S}-{sha256(''.join(hashes.values()).encode())[:8]}"
    created = now.isoformat(timespec="seconds")
    # an earlier version would fail while it serves, at the ONNX file's second output, or leave out the groups unsaid
    schema = MANIFEST_SCHEMA if base.centres or base.groups else PLAIN_SCHEMA
    manifest = Manifest(version, parent, created, base, pools, text, dict(metrics), hashes, schema, heads)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, data in {**files, MANIFEST: _dump(manifest)}.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would lock out a gateway run by another user
        _sync_directory(temporary)
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(directory.parent)
    return manifest


def ensure_free(directory: Path) -> None:
    """Raise ValueError if write_checkpoint() can't write to this directory."""
    if directory.is_symlink() or directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{directory} already exists; a checkpoint is never overwritten, so choose another --out")
    above = next(parent for parent in directory.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} can't be written: {above} is no directory that this user may write to")


def publish(directory: Path) -> None:
    """Make `current` beside a checkpoint name it, atomically."""
    pointer = directory.parent / "current"
    temporary = directory.parent / f".current.{secrets.token_hex(4)}"  # not the pid, which is 1 in every container
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(directory.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, pointer)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(directory.parent)


def resolve(place: str | Path) -> Path:
    """The checkpoint's directory that is meant by "builtin", a checkpoint, a directory with `current`, or `current`."""
    path = BUILTIN if str(place) == "builtin" else Path(place)
    if (path / MANIFEST).is_file():
        return path.resolve()  # through symlinks: the files must not change while they are read
    pointer = path / "current" if path.is_dir() else path
    name = pointer.read_text().strip() if pointer.is_file() else None
    named = pointer if name is None else pointer.parent / name
    if (named / MANIFEST).is_file():
        return named.resolve()
    if name is not None:
        raise ValueError(f"{pointer} names {name!r}, which is no checkpoint beside it: it has no {MANIFEST}")
    raise ValueError(f"{place} is no checkpoint: it holds neither {MANIFEST} nor a `current` that names one")


def check_finite(files: Mapping[str, bytes]) -> None:
    """Raises ValueError for files whose weights or calibration hold NaN or infinite numbers, or can't be read."""
    check_weights(files[WEIGHTS], WEIGHTS)
    check_onnx(files[ENCODER], ENCODER)
    try:
        numbers = json.loads(files[CALIBRATION])  # as Python writes it, with NaN and Infinity
    except ValueError as error:
        raise ValueError(f"{CALIBRATION} is not JSON: {error}") from None
    check_numbers(numbers, CALIBRATION)


def load_checkpoint(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """A checkpoint's manifest and files, each checked against its hash, weights and calibration for finite numbers.

    Raises ValueError with what is wrong.
    """
    manifest = load_manifest(path)
    files = {}
    for name, expected in manifest.files.items():
        try:
            data = _read(path, name)
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"checkpoint {path} lacks {name}, which its manifest names") from None
        if sha256(data) != expected:
            raise ValueError(f"checkpoint {path}: {name} does not match the manifest's sha256; it is damaged or edited")
        files[name] = data
    try:
        check_finite(files)
    except NotFiniteError as error:
        raise ValueError(
            f"checkpoint {path} can't be used: {error}; its training failed, so name another version"
        ) from None
    except ValueError as error:
        raise ValueError(f"checkpoint {path} can't be used: {error}") from None
    return manifest, files


def load_manifest(path: Path) -> Manifest:
    """Parse and check manifest.json alone."""
    place = path / MANIFEST
    try:
        data = _read(path, MANIFEST)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"{path} is no checkpoint: it has no {MANIFEST}") from None
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("schema") not in (PLAIN_SCHEMA, MANIFEST_SCHEMA):
        found = raw.get("schema") if isinstance(raw, dict) else None
        raise ValueError(
            f"{place} has schema {found!r}; this version reads schemas {PLAIN_SCHEMA} and {MANIFEST_SCHEMA}"
        )
    try:
        base = raw["base"]
        layers = base["layers"]
        if type(layers) is not int or layers < 0:
            raise ValueError(f"{place} says layers: {layers!r}; it must be a whole number from 0 on")
        kind = {name: base[name] for name in KIND if name in base}
        if odd := [name for name, value in kind.items() if type(value) is not bool]:
            raise ValueError(f"{place} says {odd[0]}: {kind[odd[0]]!r}; it must be true or false")
        centres = base.get("centres", 0)
        if type(centres) is not int or centres < 0:
            raise ValueError(f"{place} says centres: {centres!r}; it must be a whole number from 0 on")
        groups = tuple(base.get("groups", ()))
        if not all(isinstance(name, str) for name in groups) or len(set(groups)) < len(groups):
            raise ValueError(f"{place} names groups that are no distinct texts")
        manifest = Manifest(
            version=str(raw["version"]),
            parent=raw["parent"],
            created=str(raw["created"]),
            base=Base(str(base["encoder"]), layers, tuple(base["trained"]), **kind, groups=groups, centres=centres),
            pools=tuple(raw["pools"]),
            text=TextConfig(**raw["text"]),
            metrics=raw["metrics"],
            files=dict(raw["files"]),
            schema=raw["schema"],
            heads=tuple(raw.get("heads", ORIGINAL)),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place} is not a manifest of schema {raw['schema']}: {error!r}") from None
    if missing := sorted(set(FILES) - set(manifest.files)):
        raise ValueError(f"{place} names no {missing[0]}")
    if odd := [name for name in manifest.files if not FILE_NAME.fullmatch(name)]:
        raise ValueError(f"{place} names the file {odd[0]!r}, which is not in the checkpoint")
    return manifest


def _read(path: Path, name: str) -> bytes:
    """A checkpoint's file. Symlinks may stay inside the checkpoint, as those of a mounted volume, but not lead out."""
    real = (path / name).resolve()
    if not real.is_relative_to(path.resolve()):
        raise ValueError(f"checkpoint {path}: {name} leads out of it, to {real}; put the file itself there")
    return real.read_bytes()


def _dump(manifest: Manifest) -> bytes:
    plain = asdict(manifest)
    if manifest.heads == ORIGINAL:
        del plain["heads"]
    for name in ("groups", "centres"):
        if not plain["base"][name]:
            del plain["base"][name]
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
