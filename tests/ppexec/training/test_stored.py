"""Files of a checkpoint: data that cannot run code, and one sentence for whatever is wrong with them."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import ppexec
from ppexec import WorkerPool
from ppexec.training import checkpoint
from ppexec.training.records import read_records
from ppexec.training.stored import Reader, read_metadata
from ppsim.errors import InputError, RunError
from tests.support.remote import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
]


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "code in a checkpoint ran"))


def state() -> dict[str, torch.Tensor]:
    """As of a model and its optimizer."""
    return {
        "model.weight": torch.arange(6.0).reshape(2, 3),
        "model.half": torch.ones(3, dtype=torch.bfloat16),
        "optimizer.step": torch.zeros(()),
    }


def blank() -> dict[str, torch.Tensor]:
    """What a checkpoint is loaded into."""
    return {name: torch.full_like(value, -1) for name, value in state().items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good checkpoint, in a directory of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return checkpoint.save(tmp_path, 7, state())


def load_refused(folder: Path) -> str:
    """What is said of a checkpoint that is refused, and changes nothing."""
    into = blank()
    with pytest.raises(InputError) as refused:
        checkpoint.load(folder, into, master_weights=False)
    assert all(torch.equal(into[name], value) for name, value in blank().items())
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 600
    assert str(folder) in said
    assert not Path("exploded").exists()
    return said


def pickled(folder: Path) -> Metadata:
    """The metadata, by PyTorch's own reader."""
    return dcp.FileSystemReader(folder).read_metadata()


def test_what_was_saved_is_loaded(folder: Path) -> None:
    into = blank()
    assert checkpoint.load(folder.parent, into, master_weights=False) == 7
    assert all(torch.equal(into[name], value) for name, value in state().items())


def test_metadata_is_read_as_pytorch_reads_it(folder: Path) -> None:
    ours, theirs = read_metadata(folder / ".metadata"), pickled(folder)
    assert ours.storage_data == theirs.storage_data
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, held in theirs.state_dict_metadata.items():
        found: Any = ours.state_dict_metadata[name]
        assert type(found) is type(held)
        if name != "step":
            assert (found.size, found.chunks) == (held.size, held.chunks)
            assert found.properties.dtype == held.properties.dtype


def test_metadata_never_runs_code(folder: Path) -> None:
    hidden = pickled(folder)
    hidden.planner_data = _Bomb()
    for content in (_Bomb(), hidden):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        assert "names 'pathlib.Path.write_text'" in load_refused(folder)
    dcp.FileSystemReader(folder).read_metadata()  # which is what would have happened
    assert Path("exploded").exists()


def test_a_step_never_runs_code(folder: Path) -> None:
    """Cause of a bug: PyTorch unpickles whatever is no tensor."""
    dcp.save({**state(), "step": _Bomb()}, storage_writer=dcp.FileSystemWriter(folder))
    assert "is damaged" in load_refused(folder)
    dcp.load({**state(), "step": 0}, storage_reader=dcp.FileSystemReader(folder))
    assert Path("exploded").exists()


def test_what_stands_for_a_tensor_never_runs_code(folder: Path) -> None:
    """Both where the metadata says so, and where it says that there is a tensor."""
    dcp.save({**state(), "model.weight": _Bomb(), "step": 7}, storage_writer=dcp.FileSystemWriter(folder))
    assert "holds nothing for model.weight" in load_refused(folder)
    shutil.rmtree(folder)
    checkpoint.save(folder.parent, 7, state())
    replace_part(folder, "model.weight", _Bomb())
    assert "is damaged" in load_refused(folder)
    replace_part(folder, "model.weight", "text")
    assert "something else than a tensor of [2, 3] for model.weight" in load_refused(folder)
    replace_part(folder, "model.weight", torch.zeros(3, 2))
    assert "something else than a tensor of [2, 3] for model.weight" in load_refused(folder)


def replace_part(folder: Path, name: str, value: Any) -> None:
    """Write something else in the place of a tensor."""
    metadata = pickled(folder)
    (index,) = (each for each in metadata.storage_data if each.fqn == name)
    data = io.BytesIO()
    torch.save(value, data)
    (folder / "other").write_bytes(data.getvalue())
    metadata.storage_data[index].relative_path = "other"
    metadata.storage_data[index].offset = 0
    metadata.storage_data[index].length = len(data.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _without_step(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("step")]


def _elsewhere(name: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    return change


def _with_chunk(name: str, value: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        setattr(metadata.state_dict_metadata["model.weight"].chunks[0], name, value)

    return change


def _with_place(name: str, value: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            setattr(info, name, value)

    return change


def _endless() -> list[Any]:
    """Nested lists that are small in a file, and without end as text."""
    value: list[Any] = []
    for _ in range(100):
        value = [value, value]
    return value


CHANGES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "no step": (_without_step, "does not say which step"),
    "another directory": (_elsewhere("../../x"), "in the place of a file's name"),
    "an absolute path": (_elsewhere("/etc/passwd"), "in the place of a file's name"),
    "no such file": (_elsewhere("nosuch"), "No such file"),
    "a nul": (_elsewhere("a\0b"), "in the place of a file's name"),
    "a part outside": (_with_chunk("sizes", torch.Size([2, 4])), "a part of model.weight is outside"),
    "a part short": (_with_chunk("sizes", torch.Size([2, 2])), "the parts of model.weight are not the whole"),
    "a part of another shape": (_with_chunk("sizes", torch.Size([6])), "is not the metadata"),
    "a part nowhere": (_with_chunk("offsets", torch.Size([0, 1])), "model.weight"),
    "lists as sizes": (_with_chunk("sizes", [2, 3]), "a list in the place of sizes"),
    "an endless text": (_with_chunk("sizes", _endless()), "a list in the place of sizes"),
    "beyond the file": (_with_place("length", 2**50), "is cut off"),
    "before the file": (_with_place("offset", -1), "in the place of a size"),
    "a fraction": (_with_place("offset", True), "in the place of a size"),
    "transformed": (_with_place("transform_descriptors", ["zstd"]), "its files are transformed"),
    "no places": (lambda metadata: setattr(metadata, "storage_data", None), "in the place of a mapping"),
    "no tensors": (lambda metadata: setattr(metadata, "state_dict_metadata", {}), "holds nothing for model.weight"),
    "a number as tensor": (
        lambda metadata: metadata.state_dict_metadata.update({"model.weight": 1}),  # type: ignore[dict-item]
        "a int in the place of TensorStorageMetadata",
    ),
    "another type": (
        lambda metadata: setattr(metadata.state_dict_metadata["model.weight"].properties, "dtype", torch.float64),
        "something else than a tensor of [2, 3]",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_was_changed_is_one_sentence(folder: Path, name: str) -> None:
    change, message = CHANGES[name]
    metadata = pickled(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert message in load_refused(folder)


def test_damaged_files_are_one_sentence_each(folder: Path) -> None:
    """Cut off anywhere, or with any byte changed. A changed byte may be one that says nothing, so it may also load."""
    for path in (folder / ".metadata", folder / "__0_0.distcp"):
        good = path.read_bytes()
        for cut in range(0, len(good), 97):
            path.write_bytes(good[:cut])
            assert str(path) in load_refused(folder)
        for place in range(0, len(good), 41):
            path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
            into = blank()
            try:
                checkpoint.load(folder, into, master_weights=False)
            except InputError as error:
                said = str(error)
            else:
                said = str(folder)
                assert all(torch.equal(into[name], value) for name, value in state().items()), place
            assert str(folder) in said
            assert "\n" not in said
            assert len(said) < 600
        path.unlink()
        assert str(folder) in load_refused(folder)
        path.mkdir()
        assert str(folder) in load_refused(folder)
        path.rmdir()
        path.write_bytes(good)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"\x80\x04Nr" + struct.pack("<I", 2**28) + b".",  # Python's own reader takes 4 GiB for this
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04]\x94h\x00a.",  # a list in itself
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04" + b"]\x94" * 3 + b"aa.",
        b"\x80\x04)" + b"\x94h\x00\x86" * 60 + b"}\x94(h\x00Nu.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x05torch\x94\x8c\x04load\x94\x93\x94.",
        pickle.dumps({"a": [1, 2]}),
        pickle.dumps(torch.float32),
        pickle.dumps(torch.Size([1])),
        b"PK\x03\x04",
    ],
)
@pytest.mark.timeout(60)
def test_what_is_no_metadata_is_refused_at_once(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    load_refused(folder)


def test_a_compressed_archive_is_refused(folder: Path) -> None:
    """A few bytes of it may be as many as memory has."""
    with zipfile.ZipFile(folder / "other", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    packed = (folder / "other").read_bytes()
    metadata = pickled(folder)
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "other", 0, len(packed)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "compressed" in load_refused(folder)


def test_records_keep_what_a_pickle_says() -> None:
    content = {
        "a": (1, -2, 2**40, True, None, "text"),
        "b": [[], {}, (), (1,), (1, 2), (1, 2, 3)],
        "c": list(range(2000)),
    }
    assert read_records(pickle.dumps(content), ()) == content
    record = read_records(pickle.dumps(Path("x")), {("pathlib", "PosixPath")})
    assert (record.kind, record.arguments, record.state) == ("PosixPath", ("x",), None)


def test_a_step_is_a_whole_number(folder: Path) -> None:
    for step in (-1, 1.5, True, "7", None, 2**70):
        dcp.save({**state(), "step": step}, storage_writer=dcp.FileSystemWriter(folder))
        assert "must be a whole number of 0 or more" in load_refused(folder)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "step-00000007").write_text("in the way")
    with pytest.raises(RunError, match=r"step 7 could not be saved to .*: File exists"):
        checkpoint.save(tmp_path, 7, state())


def test_a_rank_with_a_damaged_file_is_the_one_that_speaks(pool: WorkerPool, tmp_path: Path) -> None:
    config = tiny(schedule="1f1b")
    folder = ppexec.train(config, save=tmp_path, pool=pool).checkpoint
    path = Path(str(folder), "__1_0.distcp")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"^\S*__1_0.distcp is cut off"):
        ppexec.train(config, resume=tmp_path, pool=pool)


def test_the_reader_has_no_other_way(folder: Path) -> None:
    """PyTorch would go on to metadata of one rank, another pickle."""
    (folder / "__0.metadata").write_bytes(pickle.dumps(_Bomb()))
    (folder / ".metadata").unlink()
    with pytest.raises((InputError, dcp.CheckpointException)):
        dcp.load(blank(), storage_reader=Reader(folder))
    assert not Path("exploded").exists()
