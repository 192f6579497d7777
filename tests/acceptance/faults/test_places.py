"""Outputs that can't be: one sentence, exit 1, and nothing changed."""

import pytest
from forks import partial


def refused(ended, *words):
    assert ended.status == 1, ended.said
    assert len(ended.lines) == 1, ended.said
    assert ended.lines[0].startswith("Error: ")
    for word in words:
        assert word in ended.lines[0], ended.said


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


PLACES = {
    "a file": (lambda folder: folder / "file", ("file exists already",)),
    "below a file": (lambda folder: folder / "file" / "out", ("Not a directory", "give another -o OUT")),
    "far below a file": (lambda folder: folder / "file" / "a" / "out", ("Not a directory", "give another -o OUT")),
    "a link to nothing": (lambda folder: folder / "link", ("link exists already",)),
    "a link to a folder": (lambda folder: folder / "linked", ("linked exists already",)),
    "a long name": (lambda folder: folder / ("x" * 300), ("File name too long", "give another -o OUT")),
    "a name that is too long with what comes behind": (
        lambda folder: folder / ("x" * 250),
        ("File name too long", "give another -o OUT"),
    ),
    "below a link that leads in a circle": (
        lambda folder: folder / "circle" / "out",
        ("ink", "circle", "give another -o OUT"),
    ),
    "below a link to nothing": (lambda folder: folder / "link" / "out", ("give another -o OUT",)),
    "a device": (lambda folder: "/dev/null", ("/dev/null exists already",)),
    "below a device": (lambda folder: "/dev/null/out", ("Not a directory", "give another -o OUT")),
    "a disk that isn't there": (lambda folder: "/proc/no-such-disk/out", ("give another -o OUT",)),
    "a file of unfinished work": (lambda folder: folder / "busy", ("busy.partial exists and isn't quantkit's",)),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_written_to(job, tmp_path, name):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "busy.partial").write_text("precious")
    place, words = PLACES[name]
    before = tree(tmp_path)
    refused(job().run(place(tmp_path)), *words)
    assert tree(tmp_path) == before


def test_a_link_in_place_of_unfinished_work(job, tmp_path):
    (tmp_path / "out.partial").symlink_to(tmp_path / "nowhere")
    refused(job().run(tmp_path / "out"), "out.partial exists and isn't quantkit's; move it away")


def test_an_empty_folder_of_unfinished_work_is_taken(job, tmp_path):
    """A kill between the folder and its marker leaves one."""
    partial(tmp_path / "out").mkdir()
    job().goes_on(tmp_path / "out")
