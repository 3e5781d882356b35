"""Headers of tars, one after another."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import tar_of

from capfilt.data.shards.tar import Cut, Entry, Tar, _common_header, tar_header


def walked(data: bytes, seekable: bool = False) -> tuple[list[tuple[str, bytes | str]], str]:
    """Names with what is in them, and how the walk ended."""
    found: list[tuple[str, bytes | str]] = []
    tar = Tar(io.BytesIO(data), seekable)
    try:
        for entry in tar:
            found.append((entry.name, entry.problem or ("" if entry.kind != "file" else tar.read())))
    except Cut as cut:
        return found, cut.reason
    return found, ""


LONG = "a folder/" * 30 + "name.jpg"


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seekable", [False, True])
def test_names_and_data(kind: int, seekable: bool) -> None:
    files: list[tuple[str, bytes]] = [("a", b""), (LONG, b"x" * 5000), ("é\u200c", b"y"), ("b" * 100, b"z" * 512)]
    assert walked(tar_of(*files, format=kind), seekable) == (files, "")


@pytest.mark.parametrize("seekable", [False, True])
def test_tars_behind_one_another_are_read_whole(seekable: bool) -> None:
    one, two = tar_of(("a", b"1")), tar_of(("b", b"2"), ("c", b"3"))
    for between in (b"", bytes(512), bytes(102_400)):
        found = walked(one + between + two + bytes(512 * 7 + 3), seekable)
        assert found == ([("a", b"1"), ("b", b"2"), ("c", b"3")], "")


def test_what_follows_an_end_and_is_no_tar_is_said() -> None:
    found, why = walked(tar_of(("a", b"1")) + b"signature".ljust(1024, b"."))
    assert found == [("a", b"1")]
    assert why.startswith("shard cut at byte 10752: there is no header of a tar")


def test_zeros_without_end_are_left() -> None:
    data = tar_of(("a", b"1")) + bytes(70 * 2**20)
    assert walked(data) == ([("a", b"1")], "shard cut at byte 67110400: more than 67108864 zeros in a row")


def pax(name: str, data: bytes, **fields: str) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.pax_headers = len(data), fields
    return header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("before", "name", "why"),
    [
        (pax("a", b"x" * 700, comment="c" * 2_000_000), "a", "too large a header (2000017 bytes before it; 1048576"),
        (pax("a", b"x" * 700, **{"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}), "a", "a sparse file"),
        (pax("a", b"x" * 700, **{"GNU.sparse.name": "b", "GNU.sparse.major": "1"}), "b", "a sparse file"),
        (pax("a", b"x" * 700, comment="c").replace(b"comment=c", b"comment:c"), "a", "a damaged pax header"),
    ],
)
@pytest.mark.parametrize("seekable", [False, True])
def test_a_member_that_cannot_be_read_says_why_and_the_rest_is_read(
    before: bytes, name: str, why: str, seekable: bool
) -> None:
    found, end = walked(before + tar_of(("c", b"1")), seekable)
    assert end == ""
    assert found[1:] == [("c", b"1")]
    assert found[0][0] == name
    assert str(found[0][1]).startswith(why)


def test_a_sparse_file_of_gnu_tar(tmp_path: Path) -> None:
    for i, holes in enumerate((1, 30)):  # thirty do not fit into one header
        with (tmp_path / f"{i}.jpg").open("wb") as file:
            for _ in range(holes):
                file.seek(100_000, io.SEEK_CUR)
                file.write(b"data")
    (tmp_path / "z.txt").write_bytes(b"behind")
    for kind in ("gnu", "posix"):
        said = ["tar", "--sparse", f"--format={kind}", "-cf", "all.tar", "0.jpg", "1.jpg", "z.txt"]
        subprocess.run(said, cwd=tmp_path, check=True)
        why = "a sparse file (write it whole: tar without --sparse)"
        assert walked((tmp_path / "all.tar").read_bytes()) == (
            [("0.jpg", why), ("1.jpg", why), ("z.txt", b"behind")],
            "",
        )


def test_kinds_of_members() -> None:
    made = []
    for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("f", tarfile.FIFOTYPE), ("u", b"Q")):
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, "/etc/passwd" if name == "l" else ""
        made.append(header)
    found = list(Tar(io.BytesIO(tar_of(*made, ("a", b"")))))
    assert [(entry.name, entry.kind) for entry in found] == [
        ("d", "folder"), ("l", "other"), ("f", "other"), ("u", "other"), ("a", "file"),
    ]  # fmt: skip
    assert found[-1] == Entry("a", "file", 0, 5 * 512)


@pytest.mark.parametrize("seekable", [False, True])
def test_a_cut_anywhere_is_a_cut(seekable: bool) -> None:
    whole = tar_of(("a", b"x" * 700), ("b", b"y" * 10))
    for length in (*range(0, 2560, 64), 2559):
        found, why = walked(whole[:length], seekable)
        assert (why != "") == (length < 2560), length
        assert found in ([("a", b"x" * 700)][: length >= 512 + 700], [("a", b"x" * 700), ("b", b"y" * 10)])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
def test_ordinary_headers_are_read_as_tarfile_reads_them(data: st.DataObject, kind: int) -> None:
    made = tarfile.TarInfo(data.draw(st.text(st.sampled_from("ab/.é 0"), min_size=1, max_size=30)))
    made.size = data.draw(st.integers(0, 8**11 - 1))
    made.type = data.draw(st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE]))
    block = bytearray(made.tobuf(kind)[-512:])
    for position in data.draw(
        st.lists(st.sampled_from([*range(124, 136), *range(148, 157), *range(257, 265), 0, 99, 345]), max_size=2)
    ):
        block[position] = data.draw(st.sampled_from([0, 32, 48, 55, 57, 128, 255]))
    if data.draw(st.booleans()):  # with a checksum that holds
        block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    found = _common_header(bytes(block))
    if found is not None:
        theirs = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "backslashreplace")
        assert (found.name, found.size, found.isreg()) == (theirs.name, theirs.size, theirs.isreg())


@pytest.mark.parametrize("name", ["L", "x"])
def test_headers_before_headers_end(name: str) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = name.encode()
    found, why = walked(tar_of(("a", b"1"))[:1024] + header.tobuf(tarfile.GNU_FORMAT) * 200)
    assert found == [("a", b"1")]
    assert why.endswith("headers without end")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.jpg", 0),
        ("é日.txt", 5),
        ("x" * 100, 8**11 - 1),
        ("x" * 101, 3),
        ("日" * 34, 1),
        ("b", 8**11),
        ("\udc80.txt", 1),
    ],
)
def test_a_header_is_the_one_that_tarfile_writes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert tar_header(name, size) == member.tobuf(tarfile.GNU_FORMAT)
