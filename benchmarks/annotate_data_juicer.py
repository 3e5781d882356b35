"""capfilt beside data-juicer's image_captioning_mapper and image_text_matching_filter: images per second, from files.

    python -m venv dj && dj/bin/pip install py-data-juicer torch transformers && dj/bin/pip install -e .
    dj/bin/python benchmarks/annotate_data_juicer.py

Both read the same JPEGs, write one caption of 20 tokens for each and score it and the web text, in fp32, with the same
random weights and the same batch size. data-juicer's two operators are called directly, without its dataset and its
executor around them, which is the best that they can do. Three things are not the same, the first two in its favour:
it has no ITC score, so it computes itm alone; it draws from the 50 likeliest tokens, not from the nucleus of 30,524;
and it asks for 128 new tokens whatever its settings say, which is turned into 20 here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from data_juicer.ops.filter.image_text_matching_filter import ImageTextMatchingFilter
from data_juicer.ops.mapper.image_captioning_mapper import ImageCaptioningMapper
from data_juicer.utils.constant import Fields, StatsKeys
from data_juicer.utils.mm_utils import SpecialTokens
from transformers import BlipForConditionalGeneration

from capfilt import config as configs
from capfilt import presets
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.evaluation import speed
from capfilt.inference.device import Compute
from capfilt.models import BlipConfig
from capfilt.pipelines import export
from capfilt.pipelines.bench.annotate import make_job
from capfilt.pipelines.bench.bench import BenchConfig
from capfilt.pipelines.bench.made_up import make_models, make_shard
from capfilt.stages.annotation.shard_annotator import ShardAnnotator

CPU = torch.device("cpu")


class DataJuicer:
    """The two operators over the pictures of a shard, as files."""

    def __init__(self, roles: tuple[Path, Path], url: str, config: BenchConfig, folder: Path):
        for role, path in zip(("captioner", "filter"), roles, strict=True):
            export.run(str(path), "hf", folder / role)
        self.write = ImageCaptioningMapper(
            hf_img2seq=str(folder / "captioner"), caption_num=config.captions, gpu_batch_size=config.batch_size
        )
        self.judge = ImageTextMatchingFilter(hf_blip=str(folder / "filter"))
        self.size = config.batch_size
        self.samples = []
        for item in shards.read(url):
            assert isinstance(item, Sample)
            path = folder / f"{item.key}.jpg"
            path.write_bytes(item.image)
            self.samples.append({"text": f"{SpecialTokens.image}{item.text}{SpecialTokens.eoc}", "images": [str(path)]})

    def annotate(self) -> list[float]:
        """The itm of every text."""
        scores = []
        for start in range(0, len(self.samples), self.size):
            some = self.samples[start : start + self.size]
            written = self.write.process_batched({key: [sample[key] for sample in some] for key in ("text", "images")})
            for text, images in zip(written["text"], written["images"], strict=True):
                sample: dict[str, Any] = {"text": text, "images": images, Fields.stats: {}}
                told = self.judge.compute_stats_single(sample)
                scores += told[Fields.stats][StatsKeys.image_text_matching_score]
        return scores


def write_as_much(tokens: int) -> None:
    """Let `generate` write so many tokens, whatever it is asked for."""
    generate = BlipForConditionalGeneration.generate

    def limited(self: Any, *args: Any, **how: Any) -> Any:
        return generate(self, *args, **{**how, "max_new_tokens": tokens, "min_new_tokens": tokens})

    BlipForConditionalGeneration.generate = limited


def main() -> None:
    """Measure in turns, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = BenchConfig(images=options.images, captions=options.captions, batch_size=16, precision="fp32")
    architecture = configs.read(presets.find("models", config.model), BlipConfig)
    took: dict[str, list[float]] = {"data-juicer": [], "capfilt": []}
    worked: dict[str, list[float]] = {"data-juicer": [], "capfilt": []}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = Path(scratch)
        roles = make_models(architecture, folder, shared=False)
        url = make_shard(folder / "web" / "00000.tar", config.images, config.width, architecture.text.vocab_size - 7)
        work = ShardAnnotator(make_job(config, Compute(device="cpu", precision="fp32"), roles, folder / "run"), CPU)
        peer = DataJuicer(roles, url, config, folder / "peer")
        write_as_much(config.tokens)
        for turn in range(options.repeats + 1):
            for name, run in (("data-juicer", peer.annotate), ("capfilt", lambda: work.shard(url))):
                before = time.process_time()
                spent = speed.seconds(CPU, run)
                if turn:  # the first time is for warming up
                    took[name].append(spent)
                    worked[name].append(time.process_time() - before)
        assert len(peer.annotate()) == options.images * 2, "a text was not scored"
    rates = {name: options.images / statistics.median(times) for name, times in took.items()}
    own = {name: options.images / statistics.median(times) for name, times in worked.items()}
    record = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "options": vars(options),
        "by_the_clock": {"images_per_second": rates, "ratio": rates["capfilt"] / rates["data-juicer"]},
        "by_processor_time": {"images_per_second": own, "ratio": own["capfilt"] / own["data-juicer"]},
        "seconds": took,
        "processor_seconds": worked,
        "machine": speed.machine(CPU),
        "versions": {**speed.versions(), **{name: version(name) for name in ("transformers", "py-data-juicer")}},
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
