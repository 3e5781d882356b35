"""What is drawn at random for fixed inputs: texts, steps, weights, order, pictures, the embedded world."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

UIDS = ("00000000000000000000000000000000", "8f14e45fceea167a5a36dedd4bea2543")


def drawn() -> str:
    """What is drawn for fixed inputs: texts, steps, weights, order, pictures, the embedded world."""
    result: dict[str, Any] = {}
    for part in (_text_draws, _training_draws, _order_draws, _picture_draws, _world_draws, _batch_draws, _weight_draws):
        result |= part()
    return "".join(
        f"{name}: {value if isinstance(value, str) else json.dumps(value)}\n" for name, value in result.items()
    )


def _text_draws() -> dict[str, Any]:
    from capfilt.inference.generation.decode import uniforms
    from capfilt.reporting.sampling import in_random_order

    places = [(0, 0, UIDS[0], 0), (0, 1, UIDS[0], 0), (0, 0, UIDS[0], 1), (7, 2, UIDS[1], 3)]
    result: dict[str, Any] = {f"text {place}": uniforms(*place, 4).tolist() for place in places}
    return result | {"shards of a gallery": sorted(in_random_order([f"{i:05d}" for i in range(40)])[:6])}


def _training_draws() -> dict[str, Any]:
    import torch

    from capfilt.objectives.draws import Draws
    from capfilt.objectives.losses.negatives import negative_weights
    from capfilt.pipelines.bootstrap.context import BootstrapContext
    from capfilt.training.loop import draw

    places = [(0, "weights"), (0, "step", 0, 0), (0, "step", 0, 1), (0, "step", 1, 0), (12345, "step", 499, 3)]
    result: dict[str, Any] = {f"draw {place}": draw(*place) for place in places}
    similarity = torch.tensor([[((7 * i + 3 * j) % 11) / 5 for j in range(8)] for i in range(8)])
    images = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    for step in range(3):
        torch.manual_seed(draw(0, "step", step, 0))
        drawn = Draws().columns("wrong_texts", negative_weights(similarity, images, images))
        result[f"hard negatives of step {step}"] = drawn.tolist()
    for seed in (0, 1):
        context: Any = SimpleNamespace(config=SimpleNamespace(seed=seed))
        purposes = ("pretrain", "captioner", "filter", "stage-1", "stage-2", "language")
        result |= {f"seed {(seed, r)}": {p: BootstrapContext.seed(context, r, p) for p in purposes} for r in range(3)}
    return result


def _order_draws() -> dict[str, Any]:
    from capfilt.data.loading.order import RowOrder

    rows = {"a": 7, "b": 5, "c": 9, "d": 4, "e": 6}
    order = RowOrder([(["a", "b", "c"], 1), (["d", "e"], 1.5)], rows, 4, 3)

    def walked(lane: int, position: int) -> str:
        def read(epoch: int, span: Any) -> Iterator[str]:
            return (f"{span.url}{i}" for i in range(span.first, span.first + span.count))

        stream = order.walk(lane, position, 4, read)
        return " ".join(next(stream) for _ in range(20))

    result: dict[str, Any] = {f"shards of epoch {epoch}": "".join(order.shards(epoch)) for epoch in range(4)}
    return result | {f"rows of lane {lane} from {at}": walked(lane, at) for lane in (0, 3) for at in (0, 13)}


def _picture_draws() -> dict[str, Any]:
    from capfilt.data.images import decode as images
    from capfilt.data.images.augment import AugmentConfig, augment, crop_box, generator
    from capfilt.data.loading.loader import image_id
    from capfilt.data.synthetic import world

    config = AugmentConfig(crop=(0.5, 1.0), flip=True, randaugment=(2, 5))
    picture = images.decode(world.sample(world.WorldConfig(image_size=64), 0, "web", 0).image)
    result: dict[str, Any] = {f"number of {uid}": image_id(uid) for uid in UIDS}
    for place in [(0, 0, UIDS[0]), (0, 1, UIDS[0]), (5, 777, UIDS[1])]:
        result[f"picture {place}"] = {
            "drawn": generator(*place).random(2).tolist(),
            "crop": crop_box(640, 480, (0.2, 1.0), generator(*place)),
            "augmented": _digest(augment(picture, 32, config, generator(*place)).tobytes()),
        }
    return result


def _world_draws() -> dict[str, Any]:
    from capfilt.data.images import decode as images
    from capfilt.data.images.preprocess import BLIP_PREPROCESS
    from capfilt.data.synthetic import world

    config, result = world.WorldConfig(), dict[str, Any]()
    for seed, split, index in [(0, "web", 0), (0, "web", 1), (0, "web", 3999), (1, "web", 0), (0, "human", 0),
                               (0, "val", 0), (0, "test", 0), (0, "test", 249)]:  # fmt: skip
        made = world.sample(config, seed, split, index)
        pixels = BLIP_PREPROCESS.to_pixels(images.decode(made.image), config.image_size)
        result[f"world {(seed, split, index)}"] = {
            **{name: made.meta.get(name) for name in ("key", "uid", "truth")},
            "texts": [caption["text"] for caption in made.captions],
            "image": f"{made.extension} {_digest(made.image)}",
            "pixels": _digest(pixels.tobytes()),
        }
    return result


def _batch_draws() -> dict[str, Any]:
    from capfilt.data.loading.config import LoaderConfig, Source
    from capfilt.data.loading.loader import Loader
    from capfilt.data.synthetic import world
    from capfilt.data.text.tokenizer import Tokenizer

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = world.WorldConfig(human=24, shard_size=10, captions=2)
        urls = tuple(map(str, world.write(small, 0, Path(folder), "human")))
        sources = [Source(shards=urls)]
        for captions, rank, ranks in [("all", 0, 1), ("all", 1, 2), ("one", 0, 1)]:
            config = LoaderConfig(batch_size=8, max_length=16, shuffle=16, lanes=4, captions=captions)
            loader = Loader(sources, config, Tokenizer.load("world"), 32, 1, rank, ranks)
            stream = loader.batches(start=1)
            for step, batch in enumerate(islice(stream, 3), 1):
                result[f"batch {step}, captions {captions}, rank {rank} of {ranks}"] = {
                    "uids": " ".join(uid[:6] for uid in batch.uids),
                    "ids": _digest(batch.ids.numpy().tobytes()),
                    "pixels": _digest(batch.images.numpy().round(3).tobytes()),
                }
            stream.close()
    return result


def _weight_draws() -> dict[str, Any]:
    """To three digits: vector instructions differ in the last bits of a normal draw."""
    import torch

    from capfilt import presets
    from capfilt.models import build, read_architecture
    from capfilt.training.loop import draw

    result: dict[str, Any] = {}
    for name in ("blip/tiny", "blip2/tiny", "blip2/tiny-opt"):
        torch.manual_seed(draw(0, "weights"))
        state = build(read_architecture(presets.find("models", name))).state_dict()
        random = [key for key, tensor in state.items() if tensor.ndim > 1 and bool(tensor.float().std() > 0)]
        for key in (*random[:2], random[len(random) // 2], *random[-2:]):
            values = state[key].float().flatten()[:4].tolist()
            result[f"first weights of {name} {key}"] = " ".join(f"{value:.3f}" for value in values)
    return result


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
