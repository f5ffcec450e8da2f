import os
from pathlib import Path

import pytest

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked


def write_half(target, error, folder=False):
    with atomic_path(target) as temporary:
        if folder:
            temporary.mkdir()
        (temporary / "part" if folder else temporary).write_text("ne")
        raise error


def test_a_file_appears_whole_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b" / "figures.npz"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".npz"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["figures.npz"]


def test_a_failure_keeps_what_was_there_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "model"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(target, RuntimeError("half way"))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_counts_as_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "model", KeyboardInterrupt(), folder=True)
    assert not any(tmp_path.iterdir())


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "model"
    for round_ in ("first", "second"):
        with atomic_path(target) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / round_).write_text(round_)
    assert [entry.name for entry in (target / "deep").iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_stays_when_its_successor_fails(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(target, RuntimeError("half way"), folder=True)
    assert (target / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("before", ["nothing", "file", "directory"])
def test_a_block_that_writes_nothing_is_an_error_and_destroys_nothing(tmp_path, before):
    target = tmp_path / "model"
    if before == "file":
        target.write_text("old")
    elif before == "directory":
        target.mkdir()
        (target / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    kept = target / "weights" if before == "directory" else target
    assert kept.exists() == (before != "nothing")
    assert len(list(tmp_path.iterdir())) == (before != "nothing")


def test_what_is_written_is_flushed_to_disk_first(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), fsync(descriptor))[1])
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("x")
        (temporary / "b").write_text("y")
    assert len(flushed) >= 2


def test_a_path_given_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_path("plain.txt") as temporary:
        temporary.write_text("x")
    assert Path("plain.txt").read_text() == "x"


def test_a_folder_is_kept_for_one(tmp_path):
    refused = pytest.raises(UserError, match="run is in use by another run")
    with locked(tmp_path / "run"), refused, locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
