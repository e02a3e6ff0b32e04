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

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise stop

    with pytest.raises(stop):
        write_half()
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
    ("before", "said"), [(None, "no part of it is left"), ("old", "the file that was there before is kept")]
)
def test_a_full_disk_names_the_file_and_says_what_is_left(tmp_path, before, said):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError) as caught:
        write_half()
    assert str(caught.value) == f"{path}: must be writable, got No space left on device; {said}"
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_file_that_takes_the_place_of_no_other(tmp_path, capsys):
    path = tmp_path / "new" / "a.json"
    for text in ("first", "second", "third"):
        with creating(path) as temporary:
            temporary.write_text(text)
    found = {file.name: file.read_text() for file in path.parent.iterdir()}
    assert found == {"a.json": "first", "a-2.json": "second", "a-3.json": "third"}
    assert capsys.readouterr().out.splitlines() == [
        f"{path} is another run's by now: {path.with_name(name)}" for name in ("a-2.json", "a-3.json")
    ]
    with pytest.raises(RuntimeError), creating(tmp_path / "b.json"):
        raise RuntimeError
    assert not (tmp_path / "b.json").exists()
