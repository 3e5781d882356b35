"""Hostile and broken tars, read through `shards.read`."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import tar_of

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards import members, tar


def of_type(name, kind, linkname="/etc/passwd"):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, linkname
    return header


def with_size(name, size):
    header = tarfile.TarInfo(name)
    header.size = size
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture
def outcomes(tmp_path):
    def read(data):
        (tmp_path / "00000.tar").write_bytes(data)
        return list(shards.read(str(tmp_path / "00000.tar")))

    return read


def whole(key):
    return [(f"{key}.jpg", b"i" * 700), (f"{key}.txt", key.encode()), (f"{key}.json", b"{}")]


def good(key):
    return Sample(key, b"i" * 700, "jpg", key, {})


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.txt", b"t")], "no image"),
        ([("a.json", b"{}")], "no image"),
        ([("a.jpg", b"i"), ("a.png", b"i")], "more than one image"),
        ([("a.jpg", b"i"), ("a.txt", b"\xff")], "text is not UTF-8"),
        ([("a.jpg", b"i"), ("a.json", b'{"caption": "\\ud800"}')], "text is not UTF-8"),
        ([("a.jpg", b"i"), ("a.json", b"{")], "json is broken"),
        ([("a.jpg", b"i"), ("a.json", b"\xff")], "json is broken"),
        ([("a.jpg", b"i"), ("a.json", b"[1]")], "json is not an object"),
        ([("a.jpg", b"i"), ("a.json", b"[" * 200_000)], "json nested too deep"),
        ([("a.jpg", b"i"), ("a.json", b'{"a":' * 150 + b"1" + b"}" * 150)], "json nested too deep"),
        ([of_type("a.jpg", tarfile.SYMTYPE), ("a.txt", b"t")], "not a regular file (link or device)"),
        ([("a.jpg", b"i"), of_type("a.txt", tarfile.LNKTYPE)], "not a regular file (link or device)"),
        ([of_type("a.jpg", tarfile.CHRTYPE)], "not a regular file (link or device)"),
        ([of_type("a", tarfile.FIFOTYPE)], "not a regular file (link or device)"),
    ],
)
def test_a_bad_key_is_one_fault_and_the_rest_goes_on(outcomes, files, reason):
    assert outcomes(tar_of(*whole("0"), *files, *whole("1"))) == [good("0"), FailedSample("a", reason), good("1")]


def test_text_comes_from_txt_then_caption_then_nowhere(outcomes):
    caption = json.dumps({"caption": "from json"}).encode()
    texts = tar_of(
        *[("a.jpg", b""), ("a.json", caption), ("a.txt", b"from txt")],
        *[("b.jpg", b""), ("b.json", caption)],
        *[("c.jpg", b""), ("c.json", b'{"caption": null}')],
        ("d.jpg", b""),
    )
    found = outcomes(texts)
    assert [sample.text for sample in found] == ["from txt", "from json", "", ""]
    assert found[1].meta == {"caption": "from json"}


def test_a_json_with_a_byte_order_mark_is_read(outcomes):
    (found,) = outcomes(tar_of(("a.jpg", b""), ("a.json", b'\xef\xbb\xbf{"caption": "from json"}')))
    assert (found.text, found.meta) == ("from json", {"caption": "from json"})


def test_numbers_that_json_does_not_have_are_null(outcomes, tmp_path):
    data = b'{"a": NaN, "b": [Infinity, {"c": -Infinity}], "d": 1e999, "e": -1e999, "f": 1e3, "g": 0.1, "NaN": "NaN"}'
    (found,) = outcomes(tar_of(("a.jpg", b""), ("a.json", data)))
    wanted = {"a": None, "b": [None, {"c": None}], "d": None, "e": None, "f": 1000.0, "g": 0.1, "NaN": "NaN"}
    assert found.meta == wanted
    shards.write(tmp_path / "1.tar", [found])
    with tarfile.open(tmp_path / "1.tar") as tar:
        written = tar.extractfile("a.json").read()

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    assert json.loads(written, parse_constant=refuse) == wanted


def test_a_key_met_again_is_a_fault(outcomes):
    again = FailedSample("a", "duplicate key")
    assert outcomes(tar_of(*whole("a"), *whole("a"), *whole("b"))) == [good("a"), again, good("b")]
    assert outcomes(tar_of(*whole("a"), *whole("b"), *whole("a"))) == [good("a"), good("b"), again]


@pytest.mark.parametrize("key", ["/etc/passwd", "../../a", "a/../../b", "a\nb", "k" * 2000, "a//b"])
def test_dangerous_keys_are_faults_and_touch_no_disk(outcomes, tmp_path, key):
    found = outcomes(tar_of((f"{key}.jpg", b"i"), *whole("1")))
    assert [outcome.key for outcome in found] == [key, "1"]
    assert found[0].reason.startswith("unsafe key")
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_what_is_no_sample_is_passed_over(outcomes):
    others = [
        of_type("folder", tarfile.DIRTYPE),
        ("__meta__/a.jpg", b"i"),
        ("README", b""),
        (".hidden", b""),
        ("x/._a.jpg", b""),
    ]
    assert outcomes(tar_of(*others, ("a.npy", b"n" * 5000), *whole("a"), ("b.npz", b""))) == [good("a")]
    assert outcomes(tar_of()) == []


def test_names_that_are_not_utf8_are_kept_apart(outcomes):
    data = tar_of(("\udcff.jpg", b"1"), ("\udcfe.jpg", b"2"))
    assert [outcome.key for outcome in outcomes(data)] == ["\\xff", "\\xfe"]


@pytest.mark.parametrize(("extension", "limit"), [("jpg", "256 MiB"), ("txt", "16 MiB"), ("json", "16 MiB")])
def test_a_member_over_its_limit_is_refused_unread(tmp_path, extension, limit):
    size = (members.MAX_IMAGE if extension == "jpg" else members.MAX_TEXT) + 1
    path = tmp_path / "0.tar"
    with path.open("wb") as file:  # sparse on disk: no bytes are written for the large member
        file.write(with_size(f"a.{extension}", size))
        file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(tar_of(*whole("b")))
    tracemalloc.start()
    assert list(shards.read(str(path))) == [FailedSample("a", f"{extension} larger than {limit}"), good("b")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_header_of_a_gigabyte_is_not_read(outcomes, kind):
    header = of_type("a.jpg", kind)
    header.size = 2**30
    data = tar_of(*whole("0"), has_end=False) + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    assert outcomes(data) == [good("0"), FailedSample("00000", "shard cut at byte 8192")]


@pytest.mark.parametrize(
    "header",
    [
        with_size("a.jpg", 0)[:124] + b"\xff" * 12 + with_size("a.jpg", 0)[136:],  # a size of -1
        with_size("a.jpg", 1)[:148] + b"0000000\0" + with_size("a.jpg", 1)[156:],  # a wrong checksum
    ],
)
def test_a_damaged_header_is_not_a_quiet_end(outcomes, header):
    found = outcomes(tar_of(*whole("0"), has_end=False) + header + tar_of(*whole("1")))
    assert found[0] == good("0")
    assert [outcome.key for outcome in found[1:]] == ["00000"]
    assert found[1].reason.startswith("shard cut at byte ")


def test_a_negative_size_in_a_pax_header_ends_the_shard(outcomes):
    pax = tarfile.TarInfo("a.jpg")
    pax.pax_headers = {"size": "-2048"}
    found = outcomes(tar_of(*whole("0"), has_end=False) + pax.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    assert [outcome.key for outcome in found] == ["0", "00000"]


def test_every_cut_gives_what_came_before_and_then_one_fault(outcomes):
    data = tar_of(*whole("0"), *whole("1"), has_end=False)
    for length in range(1, len(data) + 1, 100):
        *before, last = outcomes(data[:length])
        assert before == [good(str(i)) for i in range(len(before))]
        assert isinstance(last, FailedSample)
        if length < 512:
            assert last.key == "00000"
            assert last.reason.startswith("unreadable shard: ")
        else:
            assert last.reason == f"shard cut at byte {length}"
            assert last.key == (str(len(before)) if length - 3584 * len(before) >= 512 else "00000")


def test_a_cut_gzip_is_a_cut_shard(outcomes):
    data = gzip.compress(tar_of(*whole("0"), ("1.jpg", random.Random(0).randbytes(50_000))))
    *before, last = outcomes(data[:-20_000])
    assert before == [good("0")]
    assert last.key == "1"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"not a tar" * 100, b"\x1f\x8b\x08", b"BZh91AY&SY" + b"x" * 600, b"\xfd7zXZ\0" + b"x" * 600],
)
def test_what_is_no_tar_is_one_fault_under_the_shards_name(outcomes, data):
    (fault,) = outcomes(data)
    assert fault.key == "00000"
    assert fault.reason.startswith("unreadable shard: ")


def test_a_bomb_of_empty_members_ends_in_bounded_memory(tmp_path, monkeypatch):
    """A billion of them is half a megabyte of gzip a gigabyte; here the limit is smaller, the way the same."""
    monkeypatch.setattr(tar, "MAX_MEMBERS", 20_000)
    path = tmp_path / "00000.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(tar_of(*whole("0"), has_end=False))
        file.write(with_size("x", 0) * 30_000)
    tracemalloc.start()
    found = list(shards.read(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [good("0"), FailedSample("00000", "more than 20000 members")]
    assert peak < 16 * 2**20, "the headers are not kept: they alone would take more"


def test_a_hole_of_a_terabyte_is_not_walked_through(tmp_path):
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        file.write(tar_of(*whole("0"), has_end=False))
        file.write(with_size("a.npy", 2**40))
        file.truncate(2**40)
    why = "shard cut at byte 4096: a member of 1099511627776 bytes, 17179869184 are allowed"
    assert list(shards.read(str(path))) == [good("0"), FailedSample("00000", why)]


KEPT = [
    # What fuzzing and others' bug reports found worth keeping: each once broke a reader of tars somewhere.
    tar_of(("a.jpg", b"i"), has_end=False) + b"\0" * 511,  # an end that is one byte short
    tar_of(("a.jpg", b"i"))[:700],  # a member whose padding is cut
    with_size("a.jpg", 8**11 - 1) + bytes(512),  # the largest size that octal can spell
    of_type("a.jpg", tarfile.LNKTYPE, "a.jpg").tobuf(tarfile.GNU_FORMAT) + bytes(1024),  # a link to itself
    of_type("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) * 600,  # long names without end
    b"\x1f\x8b\x08\0" + bytes(6) + b"\xed\xfd" + b"\xff" * 64,  # a gzip whose blocks are noise
    gzip.compress(gzip.compress(tar_of(("a.jpg", b"i")), mtime=0), mtime=0),  # a gzip in a gzip
    tar_of(("a.json", b'{"a": 1e999999, "b": NaN}'), ("a.jpg", b"i")),  # numbers that are none
    tar_of(("a.json", b'{"a": ' + b"9" * 5000 + b"}"), ("a.jpg", b"i")),  # an integer that Python refuses to read
]


@pytest.mark.parametrize("data", KEPT, ids=range(len(KEPT)))
def test_kept_cases_end_as_samples_and_faults(outcomes, data):
    found = outcomes(data)
    assert found
    assert all(isinstance(outcome, Sample | FailedSample) for outcome in found)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=3000), begin=st.sampled_from([b"", b"\x1f\x8b\x08", b"BZh9", tar_of(*whole("0"))[:1536]])
)
def test_no_bytes_raise(tmp_path_factory, data, begin):
    path = tmp_path_factory.mktemp("noise") / "00000.tar"
    path.write_bytes(begin + data)
    assert all(isinstance(outcome, Sample | FailedSample) for outcome in shards.read(str(path)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_raises(tmp_path_factory, data):
    broken = bytearray(tar_of(*whole("0"), ("k" * 150 + ".jpg", b"i"), *whole("1")))
    for position in data.draw(st.lists(st.integers(0, len(broken) - 1), max_size=8)):
        broken[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        broken = bytearray(gzip.compress(broken, mtime=0))
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1
    path = tmp_path_factory.mktemp("damage") / "00000.tar"
    path.write_bytes(broken)
    assert all(isinstance(outcome, Sample | FailedSample) for outcome in shards.read(str(path)))
