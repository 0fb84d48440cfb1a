"""Stored: the files of a checkpoint, read as data, so that a stranger's checkpoint cannot run code.

PyTorch writes a checkpoint's metadata as a pickle, and reads it with `pickle.load`, which calls whatever the file says.
Here the pickle is only taken apart into records, and PyTorch's objects are built from values that have been looked at.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan

from ppexec.training.records import ForeignName, Name, Record, read_records
from ppsim.checks import shown
from ppsim.errors import InputError
from ppsim.files import read_bytes

METADATA = ".metadata"
_REMEDY = "take another checkpoint, or save this one anew"

# All that the metadata of a checkpoint may name.
_MODULE = "torch.distributed.checkpoint"
_KINDS = (
    "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties _MEM_FORMAT_ENCODING"
)
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_NAMES = {
    *((f"{_MODULE}.metadata", name) for name in _KINDS.split()),
    (f"{_MODULE}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in _DTYPES),
    *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint's folder for PyTorch, without running what is in it.

    All that a process will read is looked at before any process reads, so a damaged checkpoint changes no tensor.

    Parameters
    ----------
    folder : Path
        Of one step.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    @cached_property
    def metadata(self) -> Metadata:
        """What the folder holds. Raises InputError if its metadata is not one that was saved."""
        return read_metadata(self._folder / METADATA)

    @cached_property
    def step(self) -> int:
        """The step that comes next. Raises InputError if there is none that can be read."""
        info = self.metadata.storage_data.get(MetadataIndex("step"))
        if info is None:
            raise InputError(f"{self._folder} does not say which step it is of: {_REMEDY}")
        step = self._part(info)
        if type(step) is not int or not 0 <= step < 2**63:
            raise InputError(f"the step of {self._folder} must be a whole number of 0 or more, got {shown(step)}")
        return step

    def read_metadata(self) -> Metadata:
        """What the folder holds, for PyTorch. It has no second way, which would read other pickles."""
        return self.metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Look at all that this process will read. Raises InputError for what is missing or damaged."""
        for index, kind in {item.storage_index: item.type for item in plan.items}.items():
            held = self.metadata.state_dict_metadata[index.fqn]
            if kind is not LoadItemType.TENSOR or not isinstance(held, TensorStorageMetadata):
                raise InputError(f"{self._folder} holds no tensor for {index.fqn}: {_REMEDY}")
            (size,) = (chunk.sizes for chunk in held.chunks if chunk.offsets == index.offset)
            part = self._part(self.storage_data[index])
            is_tensor = isinstance(part, torch.Tensor) and part.layout is torch.strided
            if not is_tensor or (part.shape, part.dtype) != (size, held.properties.dtype):
                raise InputError(f"{self._folder} holds something else than a tensor of {list(size)} for {index.fqn}")
        return plan

    def _part(self, info: _StorageInfo) -> Any:
        """What torch.save wrote to a part of a file. Raises InputError if it is damaged, or more than data."""
        path = self._folder / info.relative_path
        try:
            with path.open("rb") as file:
                if info.offset + info.length > path.stat().st_size:
                    raise InputError(f"{path} is cut off: {_REMEDY}")
                file.seek(info.offset)
                data = file.read(info.length)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}): {_REMEDY}") from None
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(each.file_size for each in archive.infolist()) > len(data):  # it would grow in memory
                    raise ValueError("compressed")
                if (damaged := archive.testzip()) is not None:  # torch.load does not look at the sums
                    raise ValueError(damaged)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # an archive can be wrong in any way
            raise InputError(
                f"{path} is damaged from byte {info.offset} on ({_first_line(error)}): {_REMEDY}"
            ) from None


def read_metadata(path: Path) -> Metadata:
    """The metadata of a checkpoint.

    Parameters
    ----------
    path : Path
        A file that `FileSystemWriter` wrote.

    Returns
    -------
    Metadata
        With the tensors and where their parts are; nothing else of the file is kept.

    Raises
    ------
    InputError
        If it is damaged, or names anything that is no part of a checkpoint.
    """
    try:
        return _metadata(read_records(read_bytes(path), _NAMES))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): {_REMEDY}") from None
    except ForeignName as error:
        raise InputError(
            f"{path} names {error}, which is no part of a checkpoint and could be there to run code: do not use what "
            "you have this file from"
        ) from None
    except Exception as error:  # a file can be wrong in any way
        raise InputError(f"{path} is not the metadata of a checkpoint ({_first_line(error)}): {_REMEDY}") from None


def _fields(record: Any, kind: type) -> dict[str, Any]:
    if not isinstance(record, Record) or record.kind != kind.__name__ or type(record.state) is not dict:
        raise _misplaced(record, kind.__name__)
    return record.state


def _misplaced(value: Any, wanted: str) -> ValueError:
    # Not the value itself: nested lists may have no end in text.
    return ValueError(f"it has a {getattr(value, 'kind', type(value).__name__)} in the place of {wanted}")


def _metadata(record: Any) -> Metadata:
    """PyTorch's object of a record. Raises anything if it is wrong."""
    fields = _fields(record, Metadata)
    stored = {_index(index): _info(info) for index, info in _items(fields["storage_data"])}
    held: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, value in _items(fields["state_dict_metadata"]):
        is_bytes = getattr(value, "kind", None) == BytesStorageMetadata.__name__
        held[_text(key)] = BytesStorageMetadata() if is_bytes else _tensor(key, value, stored)
    return Metadata(state_dict_metadata=held, storage_data=stored)


def _tensor(key: str, record: Any, stored: Mapping[MetadataIndex, _StorageInfo]) -> TensorStorageMetadata:
    fields = _fields(record, TensorStorageMetadata)
    size = _size(fields["size"])
    chunks = []
    for chunk in fields["chunks"]:
        place = _fields(chunk, ChunkStorageMetadata)
        offsets, sizes = _size(place["offsets"]), _size(place["sizes"])
        if any(begin + length > whole for begin, length, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a part of {key} is outside of it")
        if MetadataIndex(key, offsets) not in stored:
            raise ValueError(f"it does not say where a part of {key} is")
        chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(size) or len({chunk.offsets for chunk in chunks}) < len(chunks):
        raise ValueError(f"the parts of {key} are not the whole of it")
    return TensorStorageMetadata(properties=_properties(fields["properties"]), size=size, chunks=chunks)


def _properties(record: Any) -> TensorProperties:
    """Of what is in them only the type is used, wherever a checkpoint is read."""
    is_record = isinstance(record, Record) and record.kind == TensorProperties.__name__ and record.state
    dtype = record.state[0] if is_record else None
    if not isinstance(dtype, Name) or dtype.name not in _DTYPES:
        raise _misplaced(dtype, "a type of numbers")
    return TensorProperties(dtype=_DTYPES[dtype.name])


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, MetadataIndex)
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _size(offset))


def _info(record: Any) -> _StorageInfo:
    fields = _fields(record, _StorageInfo)
    name, offset, length = _text(fields["relative_path"]), _whole(fields["offset"]), _whole(fields["length"])
    if fields.get("transform_descriptors"):
        raise ValueError("its files are transformed")
    if name in ("", ".", "..") or PurePath(name).name != name or "\0" in name:
        raise ValueError(f"it has {shown(name)} in the place of a file's name")
    return _StorageInfo(relative_path=name, offset=offset, length=length)


def _items(value: Any) -> Any:
    if type(value) is not dict:
        raise _misplaced(value, "a mapping")
    return value.items()


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _misplaced(value, "a name")
    return value


def _size(record: Any) -> torch.Size:
    if not isinstance(record, Record) or record.kind != "Size":
        raise _misplaced(record, "sizes")
    (sizes,) = record.arguments
    return torch.Size([_whole(each) for each in sizes])


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise _misplaced(value, "a size")
    return value


def _first_line(error: Exception) -> str:
    """What is said of an error that the system or PyTorch raised."""
    said = str(error).strip().split("\n")[0]
    return shown(said)[1:-1] if said else type(error).__name__
