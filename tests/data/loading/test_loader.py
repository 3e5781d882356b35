from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from reference_pixels import normalised, squashed

from capfilt.data import shards
from capfilt.data.images import decode
from capfilt.data.images.augment import AugmentConfig
from capfilt.data.loading import rows as rows_module
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import AHEAD, Batch, Loader, freed_here
from capfilt.data.loading.rows import KEPT_BYTES, PairCount, count_pairs
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError, ShardError, StorageError

ROWS = 96  # of small_world: 48 pictures, two captions each


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("world")


def loader(
    folder: Path,
    tokenizer: Tokenizer,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    repeat: float = 1,
    **config: Any,
) -> Loader:
    options = {"batch_size": 8, "max_length": 24, "shuffle": 32, **config}
    sources = [Source(shards=str(folder), repeat=repeat)]
    return Loader(sources, LoaderConfig(**options), tokenizer, 16, seed, rank, world_size)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    found = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return found


def rows(batches: list[Batch]) -> list[tuple[str, tuple[int, ...]]]:
    """Each row as its uid and its ids without padding, in order."""
    return [
        (uid, tuple(ids[mask.bool()].tolist()))
        for batch in batches
        for uid, ids, mask in zip(batch.uids, batch.ids, batch.mask, strict=True)
    ]


def write_picture(folder: Path) -> Path:
    """A shard with one small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    shards.write(folder / "0.tar", [Sample("0", buffer.getvalue(), "png", "red")])
    return folder / "0.tar"


def same(a: Batch, b: Batch) -> bool:
    tensors = ("images", "ids", "mask", "image_ids")
    return a.uids == b.uids and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


class TestOrder:
    def test_an_epoch_has_every_text_once(self, small_world: Path, tokenizer: Tokenizer) -> None:
        wanted = Counter(
            (sample.uid, caption["text"])
            for url in shards.expand(str(small_world / "human"))
            for sample in shards.read(url)
            if isinstance(sample, Sample)
            for caption in sample.captions
        )
        assert wanted.total() == ROWS
        found = rows(take(loader(small_world / "human", tokenizer).batches(), ROWS // 8))
        assert Counter(uid for uid, _ in found) == Counter(uid for uid, _ in wanted.elements())
        assert Counter(tokenizer.decode(ids) for _, ids in found) == Counter(text for _, text in wanted.elements())

    def test_is_a_function_of_the_seed(self, small_world: Path, tokenizer: Tokenizer) -> None:
        one, again, other = (take(loader(small_world / "human", tokenizer, seed).batches(), 12) for seed in (0, 0, 1))
        assert all(same(a, b) for a, b in zip(one, again, strict=True))
        assert rows(one) != rows(other)
        assert Counter(rows(one)) == Counter(rows(other))

    def test_differs_from_epoch_to_epoch(self, small_world: Path, tokenizer: Tokenizer) -> None:
        both = rows(take(loader(small_world / "human", tokenizer).batches(), 24))
        assert both[:ROWS] != both[ROWS:]
        assert Counter(both[:ROWS]) == Counter(both[ROWS:])

    def test_threads_change_no_batch(self, small_world: Path, tokenizer: Tokenizer) -> None:
        augment = AugmentConfig(crop=(0.5, 1), flip=True, randaugment=(2, 5))
        before = threading.active_count()
        one, *others = (
            take(loader(small_world / "human", tokenizer, decoders=decoders, augment=augment).batches(), 14)
            for decoders in (1, 2, 8)
        )
        assert all(same(a, b) for other in others for a, b in zip(one, other, strict=True))
        assert threading.active_count() == before, "who stops early leaves no thread behind"

    def test_batches_are_freed_where_they_are_made(self, small_world: Path, tokenizer: Tokenizer) -> None:
        """They are held for as long as the thread that computes may have them."""
        made = freed_here(loader(small_world / "human", tokenizer)._batches(0))
        pictures = [weakref.ref(next(made).images) for _ in range(AHEAD + 5)]
        assert [picture() is None for picture in pictures] == [True, True] + [False] * (AHEAD + 3)

    @pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(flip=True)])
    def test_a_picture_that_stays_in_memory_is_decoded_once_where_nothing_happens_to_it(
        self, small_world: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, augment: AugmentConfig
    ) -> None:
        decoded: list[bytes] = []

        def counted(data: bytes) -> Image.Image:
            decoded.append(data)
            return real(data)

        real = decode.decode
        monkeypatch.setattr(decode, "decode", counted)
        take(loader(small_world / "human", tokenizer, decoders=1, augment=augment)._batches(0), 2 * ROWS // 8)
        assert (len(set(decoded)) == len(decoded)) is not augment.at_random

    @pytest.mark.parametrize("start", [1, 7, 12, 17])
    def test_goes_on_exactly_at_the_given_step(self, small_world: Path, tokenizer: Tokenizer, start: int) -> None:
        whole = take(loader(small_world / "human", tokenizer).batches(), 20)
        rest = take(loader(small_world / "human", tokenizer).batches(start), 20 - start)
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_ranks_share_out_each_batch(self, small_world: Path, tokenizer: Tokenizer, world_size: int) -> None:
        whole = take(loader(small_world / "human", tokenizer).batches(), 14)
        parts = [
            take(loader(small_world / "human", tokenizer, rank=rank, world_size=world_size).batches(), 14)
            for rank in range(world_size)
        ]
        for step, batch in enumerate(whole):
            own = [part[step] for part in parts]
            assert {len(part.uids) for part in own} == {8 // world_size}
            assert rows(own) == rows([batch])
            assert torch.equal(torch.cat([part.images for part in own]), batch.images)

    def test_a_source_may_count_more_than_once(self, small_world: Path, tokenizer: Tokenizer) -> None:
        twice = Source(shards=str(small_world / "human" / "00000.tar"), repeat=2)
        once = Source(shards=str(small_world / "human" / "00001.tar"))
        mixed = Loader([twice, once], LoaderConfig(batch_size=8, max_length=24), tokenizer, 16, seed=0)
        seen = Counter(uid for batch in take(mixed.batches(), 12) for uid in batch.uids)
        assert sorted(seen.values()) == [2] * 16 + [4] * 16

    def test_going_on_does_not_read_what_came_before(
        self, small_world: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[str] = []
        read = shards.read
        monkeypatch.setattr(shards, "read", lambda url: opened.append(url) or read(url))
        counted = dict.fromkeys(shards.expand(str(small_world / "human")), 32)
        sources, config = [Source(shards=str(small_world / "human"))], LoaderConfig(batch_size=8, shuffle=1, lanes=1)
        far = Loader(sources, config, tokenizer, 16, seed=0, rows=counted)._batches(1000 * ROWS // 8 + 1)
        next(far)
        assert len(opened) == 1  # of three shards, after a thousand epochs

    @pytest.mark.parametrize(("room", "times"), [(0, 12), (40_000, 3 + 8), (KEPT_BYTES, 3)])
    def test_small_shards_are_read_once_and_the_rows_are_the_same(
        self, small_world: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, room: int, times: int
    ) -> None:
        """Two epochs of three shards, each read by two lanes; there is room for all of them, for one, or for none."""
        opened: list[str] = []
        read = shards.read
        wanted = rows(take(loader(small_world / "human", tokenizer, lanes=2).batches(), 2 * ROWS // 8))
        monkeypatch.setattr(shards, "read", lambda url: opened.append(url) or read(url))
        monkeypatch.setattr("capfilt.data.loading.rows.KEPT_BYTES", room)
        counted = dict.fromkeys(shards.expand(str(small_world / "human")), 32)
        config = LoaderConfig(batch_size=8, max_length=24, shuffle=32, lanes=2)
        sources = [Source(shards=str(small_world / "human"))]
        found = list(islice(Loader(sources, config, tokenizer, 16, 0, rows=counted)._batches(0), 2 * ROWS // 8))
        assert rows(found) == wanted
        assert len(opened) <= times
        assert (len(opened) == 3) == (room == KEPT_BYTES)

    def test_ranks_read_different_shards(
        self, small_world: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read, opened = shards.read, Counter[str]()

        def noted(url: str) -> Iterator[Sample | FailedSample]:
            for item in read(url):
                opened[url] += 1
                yield item

        counted = dict.fromkeys(shards.expand(str(small_world / "human")), 32)
        monkeypatch.setattr(shards, "read", noted)
        sources, config = [Source(shards=str(small_world / "human"))], LoaderConfig(batch_size=9, shuffle=1, lanes=3)
        for rank in range(3):
            opened.clear()
            list(islice(Loader(sources, config, tokenizer, 16, 0, rank, 3, counted)._batches(0), 9))  # and one ahead
            assert len(opened) == 1  # the third of the epoch that is one shard
            assert opened.total() <= 16

    def test_more_ranks_than_shards_share_them(self, small_world: Path, tokenizer: Tokenizer) -> None:
        """Eight ranks on one shard: each has its own rows, together they are the batch of one."""
        shard, counted = str(small_world / "human/00000.tar"), {str(small_world / "human/00000.tar"): 32}
        config = LoaderConfig(batch_size=8, max_length=24, shuffle=32, lanes=8)

        def of(rank: int, world_size: int) -> list[tuple[str, tuple[int, ...]]]:
            batches = Loader([Source(shards=shard)], config, tokenizer, 16, 0, rank, world_size, counted).batches()
            return [row for batch in islice(batches, 4) for row in rows([batch])]

        apart, alone = [of(rank, 8) for rank in range(8)], of(0, 1)
        assert [own[step] for step in range(4) for own in apart] == alone

    def test_one_text_of_an_image_is_drawn_anew_each_epoch(self, small_world: Path, tokenizer: Tokenizer) -> None:
        found = rows(take(loader(small_world / "human", tokenizer, captions="one").batches(), 6 * 40))
        by_epoch = [dict(found[i : i + 48]) for i in range(0, len(found), 48)]
        assert all(len(epoch) == 48 for epoch in by_epoch)  # each image once
        drawn = {uid: Counter(epoch[uid] for epoch in by_epoch) for uid in by_epoch[0]}
        several = [texts for texts in drawn.values() if len(texts) > 1]
        assert len(several) > 40  # two captions may read alike
        first = sum(max(texts.values()) for texts in several) / sum(texts.total() for texts in several)
        assert first < 0.75

    def test_an_image_that_an_epoch_has_twice_has_a_text_drawn_for_each(
        self, small_world: Path, tokenizer: Tokenizer
    ) -> None:
        found = rows(take(loader(small_world / "human", tokenizer, captions="one", repeat=2).batches(), 12))
        texts: dict[str, set[tuple[int, ...]]] = {}
        for uid, text in found:
            texts.setdefault(uid, set()).add(text)
        assert len(found) == 2 * len(texts) == 96
        assert 10 < sum(len(own) == 2 for own in texts.values()) < 40  # half of them, of two texts each

    def test_texts_are_drawn_by_the_weight_of_their_source(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        captions = [{"text": "red", "source": "web"}, {"text": "blue", "source": "synthetic"}]
        image = next(s for s in shards.read(str(write_picture(tmp_path))) if isinstance(s, Sample))
        shards.write(
            tmp_path / "b" / "0.tar",
            [Sample(str(i), image.image, "png", "", {"uid": f"{i:032x}", "captions": captions}) for i in range(400)],
        )
        weighed = loader(tmp_path / "b", tokenizer, captions="one", weights={"web": 1, "synthetic": 3})
        texts = Counter(tokenizer.decode(ids) for _, ids in rows(take(weighed.batches(), 50)))
        assert texts.total() == 400
        assert 0.68 < texts["blue"] / 400 < 0.82

    @pytest.mark.parametrize("captions", ["all", "one"])
    def test_pictures_without_a_text_are_no_rows(
        self, tmp_path: Path, tokenizer: Tokenizer, captions: Literal["all", "one"]
    ) -> None:
        image = next(s for s in shards.read(str(write_picture(tmp_path))) if isinstance(s, Sample))
        texts = ["red", "", "...", "blue"]
        made = [Sample(f"{i:03d}", image.image, "png", texts[i % 4], {"uid": f"{i:032x}"}) for i in range(32)]
        made[0].meta["captions"] = ["red", "a red square", "!"]
        shards.write(tmp_path / "b" / "0.tar", made)
        counted = count_pairs(str(tmp_path / "b" / "0.tar"))
        assert counted == PairCount(images=16, texts=17, without_text=16)
        num = counted.num_rows(captions)
        found = rows(take(loader(tmp_path / "b", tokenizer, captions=captions, batch_size=num).batches(), 1))
        assert len(found) == num
        assert {uid for uid, _ in found} == {f"{i:032x}" for i in range(32) if i % 4 in (0, 3)}
        assert {tokenizer.decode(ids) for _, ids in found} <= {"red", "blue", "a red square"}

    def test_a_shard_that_has_become_shorter_is_an_error(self, small_world: Path, tokenizer: Tokenizer) -> None:
        url = str(small_world / "human" / "00000.tar")
        config = LoaderConfig(batch_size=8, lanes=1)
        with pytest.raises(DataError, match=r"00000\.tar has 32 rows, and 40 were counted: it changed"):
            list(islice(Loader([Source(shards=url)], config, tokenizer, 16, 0, rows={url: 40})._batches(0), 5))


class TestBatch:
    def test_equal_groups_are_the_same_picture(self, small_world: Path, tokenizer: Tokenizer) -> None:
        seen_twice = False
        for batch in take(loader(small_world / "human", tokenizer, batch_size=16, lanes=1).batches(), 6):
            for i, one in enumerate(batch.uids):
                for j, other in enumerate(batch.uids):
                    assert (batch.image_ids[i] == batch.image_ids[j]) == (one == other)
                    seen_twice |= i != j and one == other
        assert seen_twice

    def test_texts_are_cleaned_cut_at_30_words_and_begin_with_no_prompt(
        self, tmp_path: Path, tokenizer: Tokenizer, small_world: Path
    ) -> None:
        picture = next(iter(shards.read(str(small_world / "human" / "00000.tar"))))
        assert isinstance(picture, Sample)
        text = 'A "RED" circle! ' + "ring " * 40
        shards.write(tmp_path / "0.tar", [Sample("0", picture.image, picture.extension, text)])
        (batch,) = take(loader(tmp_path, tokenizer, batch_size=1, max_length=64).batches(), 1)
        wanted = [
            tokenizer.cls,
            *(tokenizer.vocab.index(w) for w in ["a", "red", "circle"] + ["ring"] * 27),
            tokenizer.sep,
        ]
        assert batch.ids[0].tolist() == wanted
        (short,) = take(loader(tmp_path, tokenizer, batch_size=1, max_length=6).batches(), 1)
        assert short.ids[0].tolist() == [*wanted[:5], tokenizer.sep]

    def test_pictures_are_squashed_and_normalised(self, small_world: Path, tokenizer: Tokenizer) -> None:
        by_uid = {s.uid: s for s in shards.read(str(small_world / "human" / "00000.tar")) if isinstance(s, Sample)}
        batch = take(loader(small_world / "human" / "00000.tar", tokenizer).batches(), 1)[0]
        for uid, found in zip(batch.uids, batch.images, strict=True):
            wanted = normalised(squashed(decode.decode(by_uid[uid].image), 16))
            assert torch.equal(found, torch.from_numpy(wanted))


class TestBadInput:
    def write(self, path: Path, source: Path, wrong: set[int]) -> list[Sample]:
        """The first shard of the world again, with some pictures broken."""
        found = [s for s in shards.read(str(source / "human" / "00000.tar")) if isinstance(s, Sample)]
        broken = [Sample(s.key, b"no", s.extension, s.text, s.meta) if i in wrong else s for i, s in enumerate(found)]
        shards.write(path, broken)
        return broken

    def test_unreadable_pictures_are_counted_and_others_stand_in(
        self, tmp_path: Path, small_world: Path, tokenizer: Tokenizer
    ) -> None:
        broken = self.write(tmp_path / "0.tar", small_world, {0, 5, 11})
        wrong = {s.uid for s in broken if s.image == b"no"}
        batches = take(loader(tmp_path, tokenizer).batches(), 4)  # one epoch: 16 pictures, two texts each
        assert sum(batch.unreadable for batch in batches) == 3 * 2
        for batch in batches:
            assert len(batch.uids) == len(batch.images) == len(batch.ids) == 8
            assert not set(batch.uids) & wrong
            assert len(set(rows([batch]))) == 8 - batch.unreadable

    def test_a_batch_of_nothing_readable_is_an_error(
        self, tmp_path: Path, small_world: Path, tokenizer: Tokenizer
    ) -> None:
        self.write(tmp_path / "0.tar", small_world, set(range(16)))
        with pytest.raises(DataError, match="none of 1008 images in a row can be read, the first of them"):
            next(loader(tmp_path, tokenizer).batches())

    def test_a_rank_none_of_whose_few_pictures_can_be_read_takes_one_that_comes_later(
        self, tmp_path: Path, small_world: Path, tokenizer: Tokenizer
    ) -> None:
        wrong = {s.uid for s in self.write(tmp_path / "0.tar", small_world, set(range(0, 16, 2))) if s.image == b"no"}
        ranks = [loader(tmp_path, tokenizer, rank=rank, world_size=8) for rank in range(8)]
        seen = [take(rank.batches(), 12) for rank in ranks]
        assert any(batch.unreadable == 1 for batches in seen for batch in batches)
        assert not {uid for batches in seen for batch in batches for uid in batch.uids} & wrong
        sound = [(b, i) for batches in seen for i, b in enumerate(batches) if not b.unreadable]
        assert len(sound) == 48, "all others are what they would be"
        for rank, batches in zip(ranks, seen, strict=True):  # and the same where it is begun again
            again = take(rank.batches(start=5), 7)
            assert [batch.uids for batch in again] == [batch.uids for batch in batches[5:]]

    def test_a_shard_whose_storage_fails_for_a_while_is_gone_on_with(
        self, small_world: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        wanted = rows(take(loader(small_world / "human", tokenizer).batches(), 6))
        shaky = loader(small_world / "human", tokenizer)
        read, reads = shards.read, itertools.count()

        def sometimes(url: str) -> Iterator[Sample | FailedSample]:
            for number, item in enumerate(read(url)):
                if number == 3 and next(reads) % 2 == 0:
                    raise StorageError("no route")
                yield item

        monkeypatch.setattr(shards, "read", sometimes)
        monkeypatch.setattr(rows_module, "PAUSES", (0, 0))
        assert rows(take(shaky.batches(), 6)) == wanted
        assert "no route; again in 0 s" in caplog.text
        sources = [Source(shards=tuple(shaky.order.rows))]
        waiting = Loader(sources, shaky.config, tokenizer, 16, 0, rows=shaky.order.rows)
        monkeypatch.setattr(rows_module, "PAUSES", ())
        with pytest.raises(StorageError, match="no route"):
            take(waiting.batches(), 6)
        monkeypatch.setattr(rows_module, "PAUSES", (1000,))
        waiting._reader.closed.set()
        with pytest.raises(StorageError, match="no route"):  # at once: a pause ends when nobody wants more
            list(waiting._batches(0))

    def test_an_empty_corpus_is_an_error(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        shards.write(tmp_path / "0.tar", [])
        with pytest.raises(DataError, match="no readable pair in 1 shards"):
            next(loader(tmp_path, tokenizer).batches())

    def test_a_missing_corpus_is_an_error(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        with pytest.raises(ShardError, match="no shard found"):
            loader(tmp_path, tokenizer)

    def test_a_shard_that_vanishes_is_an_error_where_the_batch_was_expected(
        self, small_world: Path, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        self.write(tmp_path / "0.tar", small_world, set())
        batches = loader(tmp_path, tokenizer, shuffle=1, lanes=1).batches()
        (tmp_path / "0.tar").unlink()
        with pytest.raises(ShardError, match="no shard"):
            list(batches)

    def test_a_batch_that_ranks_cannot_share_is_refused(self, small_world: Path, tokenizer: Tokenizer) -> None:
        with pytest.raises(DataError, match="batch_size 8 cannot be split over 3 ranks"):
            loader(small_world / "human", tokenizer, world_size=3)

    @pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_length": 3}, {"shuffle": 0}, {"weights": {"web": 0}}])
    def test_nonsense_is_refused(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ValidationError):
            LoaderConfig(**wrong)


def test_rows_are_texts_or_images(small_world: Path, tmp_path: Path) -> None:
    found = count_pairs(str(small_world / "human" / "00000.tar"))
    assert (found.num_rows("all"), found.num_rows("one")) == (32, 16)
    (tmp_path / "cut.tar").write_bytes((small_world / "human" / "00000.tar").read_bytes()[:30000])
    cut = count_pairs(str(tmp_path / "cut.tar"))
    assert 0 < cut.images < 16  # what cannot be read is no row


class TestTextsWithoutPictures:
    def test_a_file_of_lines_is_read_as_a_shard_of_the_same_texts(
        self, small_world: Path, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        for tar in sorted((small_world / "human").glob("*.tar")):
            samples = [item for item in shards.read(str(tar)) if isinstance(item, Sample)]
            texts = [caption["text"] for sample in samples for caption in sample.captions]
            packed = gzip.compress("\n".join(texts).encode())
            (tmp_path / f"{tar.stem}.txt.gz").write_bytes(packed)
        config = LoaderConfig(batch_size=8, max_length=24, shuffle=32)
        found = []
        for spec in (str(small_world / "human"), str(tmp_path / "{00000..00002}.txt.gz")):
            found.append(take(Loader([Source(shards=spec)], config, tokenizer, None, 0).batches(), 5))
        for tar_batch, line_batch in zip(*found, strict=True):
            assert torch.equal(tar_batch.ids, line_batch.ids)
            assert tar_batch.images.shape == line_batch.images.shape == (8, 0)
        assert len({uid for batch in found[1] for uid in batch.uids}) > 20, "texts are told apart"

    def test_lines_that_cannot_be_read_are_no_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbfa red ring\r\n\n---\n\xff\xfe\nein gr\xc3\xbcner Kreis")
        digest = shards.Digest()
        items = list(shards.read_lines(str(path), digest))
        assert [item.text if isinstance(item, Sample) else item.reason for item in items] == [
            "a red ring",
            "text is not UTF-8",
            "ein grüner Kreis",
        ]
        assert count_pairs(str(path)) == PairCount(2, 2)
        whole = digest.result()
        assert whole is not None
        assert (whole.bytes, whole.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr("capfilt.data.shards.lines.MAX_TEXT", 16)
        assert [type(item) for item in shards.read_lines(str(path))] == [Sample, FailedSample, FailedSample]
