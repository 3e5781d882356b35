"""One round of CapFilt on real photographs, downloaded by img2dataset from a server on loopback."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from capfilt import config as configs
from capfilt import presets
from capfilt.cluster.session import connect
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.bootstrap.rounds import bootstrap
from capfilt.runs.progress import Progress

NUM = 200


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(shared_dir: Path) -> Iterator[str]:
    folder = shared_dir / "photos"
    if not folder.is_dir():
        pytest.skip("no photographs beside the checkout")
    handler = functools.partial(Quiet, directory=str(folder / "images"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(served: str, shared_dir: Path, out: Path) -> dict[str, list[str]]:
    """Shards of the photographs; every second one has another picture's caption as its web text."""
    answer = json.loads((shared_dir / "photos" / "captions.json").read_text())
    texts: dict[int, list[str]] = {}
    for note in answer["annotations"]:
        texts.setdefault(note["image_id"], []).append(note["caption"])
    pictures = sorted(answer["images"], key=lambda image: image["file_name"])[:NUM]
    rows = [
        {
            "url": f"{served}/{image['file_name']}",
            "caption": texts[pictures[(i + i % 2) % len(pictures)]["id"]][0],
        }
        for i, image in enumerate(pictures)
    ]
    out.mkdir()
    (out / "list.json").write_text(json.dumps(rows))
    arguments = {
        "url_list": str(out / "list.json"),
        "input_format": "json",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": str(out / "shards"),
        "processes_count": 1,
        "thread_count": 4,
        "number_sample_per_shard": 50,
        "resize_mode": "no",
        "disable_all_reencoding": True,
    }
    program = f"from img2dataset import download\nif __name__ == '__main__':\n    download(**{arguments!r})\n"
    (out / "fetch.py").write_text(program)
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    subprocess.run(
        [sys.executable, str(out / "fetch.py")], check=True, env=environment, capture_output=True, timeout=100
    )
    return {image["file_name"]: texts[image["id"]] for image in pictures}


# The server's threads may still hold a socket that the downloader left open when the test ends.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_round_on_photographs(served: str, shared_dir: Path, tmp_path: Path) -> None:
    human_texts = download(served, shared_dir, tmp_path / "web")
    web = str(tmp_path / "web" / "shards")
    result = [item for url in shards.expand(web) for item in shards.read(url)]
    assert len(result) == NUM
    assert all(isinstance(item, Sample) for item in result)
    clean = [
        Sample(
            item.key,
            item.image,
            item.extension,
            item.text,
            {"captions": [{"text": text, "source": "human"} for text in human_texts[item.meta["url"].split("/")[-1]]]},
        )
        for item in result[:32]
        if isinstance(item, Sample)
    ]
    (tmp_path / "human").mkdir()
    shards.write(tmp_path / "human" / "00000.tar", clean)
    recipe = configs.read(
        presets.find("pipelines", "demo", within="bootstrap"),
        BootstrapConfig,
        [
            f"data={{web: {web}, human: {tmp_path / 'human'}, test: {tmp_path / 'human'}}}",
            "data.allow_contamination=true",  # it measures what it was trained on
            "rounds=1",
            *(f"{stage}.steps=3" for stage in ("pretrain", "captioner", "filter")),
            *(f"{stage}.image_size=64" for stage in ("pretrain", "captioner", "filter")),
            *(f"{stage}.loader={{batch_size: 16, max_length: 24}}" for stage in ("pretrain", "captioner", "filter")),
            "select={score: itm, threshold: keep-rate, keep_rate: 0.5}",
        ],
    )
    with connect("local") as session:
        summary = bootstrap(session, recipe, tmp_path / "run", Progress(quiet=True))
    answer = summary["rounds"][1]
    assert answer["samples_in"] == NUM == sum(answer["samples"].values())
    assert answer["samples"]["failed"] == 0
    came = {item.key: item.image for item in result if isinstance(item, Sample)}
    cleaned = sorted(str(path) for path in (tmp_path / "run" / "round-1" / "dataset").glob("*.tar"))
    kept = list(webdataset.WebDataset(cleaned, shardshuffle=False))
    assert len(kept) == answer["samples"]["kept"] > 0
    assert all(sample["jpg"] == came[sample["__key__"]] for sample in kept)
