import errno

import pytest

from experiments.errors import WriteError
from experiments.files import creating, replacing


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_part() -> None:
        with replacing(path) as temporary:
            temporary.write_text("part")
            raise stop

    with pytest.raises(stop):
        write_part()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_temporary_name(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("before", "hint"), [(None, "no part of it was written"), ("old", "the previous file is unchanged")]
)
def test_a_full_disk_names_the_file_and_its_state(tmp_path, before, hint):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)

    def write_part() -> None:
        with replacing(path) as temporary:
            temporary.write_text("part")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError) as caught:
        write_part()
    assert str(caught.value) == f"{path}: must be writable, got No space left on device; {hint}"
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_new_file_does_not_replace_another(tmp_path, capsys):
    path = tmp_path / "new" / "a.json"
    for text in ("first", "second", "third"):
        with creating(path) as temporary:
            temporary.write_text(text)
    found = {file.name: file.read_text() for file in path.parent.iterdir()}
    assert found == {"a.json": "first", "a-2.json": "second", "a-3.json": "third"}
    assert capsys.readouterr().out.splitlines() == [
        f"{path} was created by another run; writing {path.with_name(name)}" for name in ("a-2.json", "a-3.json")
    ]
    with pytest.raises(RuntimeError), creating(tmp_path / "b.json"):
        raise RuntimeError
    assert not (tmp_path / "b.json").exists()
