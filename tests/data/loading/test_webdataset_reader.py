from __future__ import annotations

import gc
import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from capfilt.data import shards
from capfilt.data.loading.webdataset_reader import webdataset
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError, ShardError

SHARDS, EACH = 4, 6


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 4), (number * 7 % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def sample(number: int) -> Sample:
    """With a web text of itm number / 100, a better synthetic one, and one that no filter scored."""
    texts = [
        {"text": f"web {number}", "source": "web", "itm": number / 100, "itc": 0.1, "round": 1},
        {"text": f"synthetic {number}", "source": "synthetic", "itm": 0.9, "itc": 0.3, "round": 1},
        {"text": f"unscored {number}", "source": "synthetic", "itm": None, "itc": None, "round": 1},
    ]
    meta = {"uid": f"{number:032x}", "captions": texts}
    return Sample(f"{number:05d}", picture(number), "png", f"synthetic {number}", meta)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(SHARDS):
        shards.write(folder / f"{shard:05d}.tar", map(sample, range(shard * EACH, (shard + 1) * EACH)))
    shards.write_sizes(folder)
    return folder


def keys(dataset: Any) -> list[int]:
    return [int(item["__key__"]) for item in dataset]


ALL = list(range(SHARDS * EACH))


class TestWhatIsRead:
    def test_an_image_its_text_and_its_json(self, cleaned: Path) -> None:
        found = next(iter(webdataset(str(cleaned))))
        assert isinstance(found["image"], Image.Image)
        assert (found["image"].size, found["image"].mode) == ((8, 4), "RGB")
        assert found["text"] == "synthetic 0"  # KEY.txt, the best one, and not the first of the list
        assert found["caption"] == sample(0).meta["captions"][1]
        assert found["json"]["uid"] == f"{0:032x}"
        assert (found["__key__"], found["__url__"]) == ("00000", str(cleaned / "00000.tar"))

    @pytest.mark.parametrize(
        "spec",
        ["{}", "{}/*.tar", "{}/{{00000..00003}}.tar", "{0}/00000.tar::{0}/00001.tar::{0}/0000[23].tar", "file://{}"],
    )
    def test_shards_are_named_as_for_every_verb(self, cleaned: Path, spec: str) -> None:
        assert keys(webdataset(spec.format(cleaned))) == ALL

    def test_a_store_and_a_folder(self, cleaned: Path, store: Any) -> None:
        for tar in cleaned.glob("*.tar"):
            (store / tar.name).write_bytes(tar.read_bytes())
        assert keys(webdataset([str(store), str(cleaned / "00000.tar")])) == [*ALL, *range(EACH)]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset closes no files
    def test_what_plain_webdataset_reads_is_the_same(self, cleaned: Path) -> None:
        tars = [str(tar) for tar in sorted(cleaned.glob("*.tar"))]
        plain = list(wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
        ours = list(webdataset(str(cleaned)).to_tuple("image", "text", "json"))
        assert [(text, meta) for _, text, meta in ours] == [(text, meta) for _, text, meta in plain]
        assert all(np.array_equal(np.asarray(a[0]), np.asarray(b[0])) for a, b in zip(ours, plain, strict=True))
        gc.collect()

    def test_a_pipe_runs_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError):
            webdataset(f"pipe:touch {tmp_path}/ran")
        assert not (tmp_path / "ran").exists()


class TestCaptions:
    def test_scores_must_reach_the_minimum(self, cleaned: Path) -> None:
        found = list(webdataset(str(cleaned), min_scores={"itm": 0.15}, caption="random", seed=1))
        texts = {item["text"] for item in found}
        assert not {f"web {n}" for n in range(15)} & texts
        assert not any(text.startswith("unscored") for text in texts)
        assert {f"web {n}" for n in range(15, 24)} & texts
        assert len(found) == len(ALL)

    def test_the_first_that_passes_where_the_best_does_not(self, tmp_path: Path) -> None:
        one, two = sample(50), sample(99)
        captions = [{**one.meta["captions"][0], "itc": 0.5}, one.meta["captions"][1]]
        shards.write(tmp_path / "a.tar", [Sample(one.key, one.image, "png", one.text, {"captions": captions}), two])
        assert [i["text"] for i in webdataset(str(tmp_path), min_scores={"itc": 0.4})] == ["web 50"]
        assert [i["text"] for i in webdataset(str(tmp_path), min_scores={"itm": 0.95, "itc": 0.0})] == ["web 99"]
        assert [i["text"] for i in webdataset(str(tmp_path), min_scores={"itm": 0.5})] == [
            "synthetic 50",
            "synthetic 99",
        ]

    def test_human_texts_have_no_scores_and_pass(self, tmp_path: Path) -> None:
        human = {"text": "by hand", "source": "human"}
        shards.write(tmp_path / "a.tar", [Sample("1", picture(1), "png", "by hand", {"captions": [human]})])
        assert [item["text"] for item in webdataset(str(tmp_path), min_scores={"itm": 0.99})] == ["by hand"]

    @pytest.mark.parametrize(("name", "has"), [("itmm", "itc, itm"), ("itm", "no scores: is this")])
    def test_a_score_that_no_text_has_is_refused(self, cleaned: Path, tmp_path: Path, name: str, has: str) -> None:
        if name == "itm":
            shards.write(tmp_path / "a.tar", [Sample("1", picture(1), "png", "from the crawl", {})])
        with pytest.raises(DataError, match=f"has no score '{name}'.*{has}"):
            list(webdataset(str(tmp_path if name == "itm" else cleaned), min_scores={name: 0.5}))

    def test_random_ones_are_of_seed_and_epoch(self, cleaned: Path) -> None:
        def drawn(seed: int, epoch: int) -> list[str]:
            dataset = webdataset(str(cleaned), caption="random", seed=seed)
            dataset.set_epoch(epoch)
            return [item["text"] for item in dataset]

        assert drawn(0, 0) == drawn(0, 0)
        assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
        assert {text.split()[0] for text in drawn(0, 0)} == {"web", "synthetic", "unscored"}

    def test_what_cannot_be_meant_is_refused(self, cleaned: Path) -> None:
        with pytest.raises(DataError, match="allowed are 'first' and 'random'"):
            webdataset(str(cleaned), caption="best")  # type: ignore[arg-type]
        with pytest.raises(DataError, match="shuffle -1"):
            webdataset(str(cleaned), shuffle=-1)
        with pytest.raises(ShardError, match="no shard"):
            webdataset(str(cleaned / "elsewhere.tar"))


class TestOrder:
    def test_shuffled_by_seed_and_epoch(self, cleaned: Path) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            dataset = webdataset(str(cleaned), shuffle=10, seed=seed).map(lambda item: item)
            dataset.set_epoch(epoch)
            return keys(dataset)

        orders = [order(0, 0), order(0, 1), order(1, 0)]
        assert all(sorted(found) == ALL for found in orders)
        assert len(set(map(tuple, [ALL, *orders]))) == 4
        assert order(0, 1) == orders[1]

    def test_passes_of_a_repeat_are_epochs(self, cleaned: Path) -> None:
        twice = keys(webdataset(str(cleaned), shuffle=10).repeat(2))
        dataset = webdataset(str(cleaned), shuffle=10)
        dataset.set_epoch(1)
        assert twice[24:] == keys(dataset)
        assert twice[:24] != twice[24:]

    def test_an_epoch_ends_where_repeat_says(self, cleaned: Path) -> None:
        assert len(keys(webdataset(str(cleaned)).repeat(nbatches=30))) == 30


class TestRanksAndWorkers:
    @pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_two_workers_share_an_epoch(self, cleaned: Path, method: str) -> None:
        dataset = webdataset(str(cleaned), shuffle=5).to_tuple("__key__", "text")
        context: Any = {"multiprocessing_context": method, "persistent_workers": True}
        loader = DataLoader(dataset, batch_size=None, num_workers=2, **context)
        epochs = []
        for epoch in (0, 1, 0):
            dataset.set_epoch(epoch)  # told to workers that run already
            epochs.append([int(key) for key, _ in loader])
        assert all(sorted(found) == ALL for found in epochs)
        assert epochs[0] == epochs[2] != epochs[1]

    def test_batches_of_tensors(self, cleaned: Path) -> None:
        dataset = webdataset(str(cleaned)).map_dict(image=np.asarray).to_tuple("image", "text").batched(3)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork"))
        assert [tuple(images.shape) for images, _ in batches] == [(3, 4, 8, 3)] * 8
        assert sorted(text for _, texts in batches for text in texts) == sorted(f"synthetic {n}" for n in ALL)

    def test_ranks_read_different_shards_of_one_order(self, cleaned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        found = []
        for rank in "012":
            monkeypatch.setenv("RANK", rank)
            found.append(keys(webdataset(str(cleaned), shuffle=8)))
        assert [len(part) for part in found] == [12, 6, 6]
        assert sorted(itertools.chain(*found)) == ALL

    def test_more_ranks_than_shards_are_refused(self, cleaned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "5")
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ShardError, match="4 shards for 5 ranks: each needs one"):
            keys(webdataset(str(cleaned)))

    def test_a_worker_without_a_shard_ends_at_once_but_not_where_epochs_have_a_length(
        self, cleaned: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NUM_WORKERS", "5")
        monkeypatch.setenv("WORKER", "4")
        assert keys(webdataset(str(cleaned))) == []
        with pytest.raises(ShardError, match="4 shards for 1 ranks of 5 DataLoader workers each"):
            keys(webdataset(str(cleaned)).repeat(nbatches=3))


class TestFaults:
    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Path:
        """A text without an image, an image that is none, one without a text, a good sample; then a cut tar."""
        members = {"0.txt": b"alone", "1.png": b"\x89PNG no", "1.txt": b"x", "2.png": picture(2), "2.json": b"{}"}
        members |= {"3.png": picture(3), "3.txt": b"good", "3.json": json.dumps({"uid": "f" * 32}).encode()}
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
        shards.write(tmp_path / "b.tar", [sample(4), sample(5)])
        (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:3000])
        return tmp_path

    def test_they_are_raised(self, damaged: Path) -> None:
        with pytest.raises((ShardError, ImageError), match=r"a\.tar: "):
            keys(webdataset(str(damaged)))

    def test_each_is_given_to_the_handler_and_the_rest_is_read(self, damaged: Path) -> None:
        faults: list[str] = []

        def handler(error: Exception) -> bool:
            faults.append(str(error))
            return True

        assert keys(webdataset(str(damaged), handler=handler)) == [3, 4]
        assert [fault.split("/")[-1].split(":")[0] for fault in faults] == ["a.tar"] * 3 + ["b.tar"]

    def test_a_handler_may_stop(self, damaged: Path) -> None:
        assert keys(webdataset(str(damaged), handler=lambda error: False)) == []

    def test_a_shard_that_is_gone(self, tmp_path: Path) -> None:
        for name in "ab":
            shards.write(tmp_path / f"{name}.tar", [sample(1)])
        strict, lenient = webdataset(str(tmp_path)), webdataset(str(tmp_path), handler=wds.ignore_and_continue)
        (tmp_path / "a.tar").unlink()
        assert len(keys(lenient)) == 1
        with pytest.raises(ShardError, match=r"a\.tar"):
            keys(strict)
