"""Lists of texts with the paths of pictures that lie beside them: blip-json, llava-json, open-clip-csv.

A picture is named by its uid, never by its key, which the web chose. A worker writes the lines of its part into
`parts/`, and the driver puts them together.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from capfilt.data.exports.form import Finished, Form, Part
from capfilt.data.sample import Sample
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

Lines = Callable[[Part, Sample, str], Iterator[str]]
"""The lines of a sample, one a text, given the path of its picture in the folder."""

INSTRUCTION = "<image>\nProvide a brief description of the given image."
"""One of LLaVA's own for its pretraining."""
_TOKENS = re.compile(r"<(?=/?(?:image|im_start|im_end|im_patch|video|s|unk|pad)>)")
"""What LLaVA's tokenizer or its templates take for more than text."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
MISSING = {
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
    *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
"""Texts that pandas reads as a missing value, quoted or not."""


def write(part: Part, samples: Iterator[Sample], lines: Lines) -> list[StoragePath]:
    """The pictures of a part as files, and the lines that name them; the file of the lines comes first."""
    listed = part.out / "parts" / f"{part.name()}.txt"
    pictures: list[StoragePath] = []

    def write_picture(named: tuple[Sample, str]) -> tuple[Sample, str]:
        with atomic(part.out / named[1]) as file:
            file.write(named[0].image)
        return named

    with atomic(listed) as file:
        # Many at once, also on a disk: alone each would wait for its own fsync.
        for sample, path in map_concurrent(write_picture, _named(part, samples), remote=True):
            pictures.append(part.out / path)
            file.writelines(line.encode() for line in lines(part, sample, path))
    return [listed, *pictures]


def _named(part: Part, samples: Iterator[Sample]) -> Iterator[tuple[Sample, str]]:
    """Samples with the paths of their pictures; a uid that comes again is numbered."""
    seen: Counter[str] = Counter()
    for sample in samples:
        again = f"-{seen[sample.uid]}" if seen[sample.uid] else ""
        seen[sample.uid] += 1
        yield sample, f"images/{part.name()}/{sample.uid}{again}.{sample.extension}"


def blip_lines(part: Part, sample: Sample, path: str) -> Iterator[str]:
    """As BLIP's `pretrain_dataset` reads them, which opens the path as it stands."""
    for caption in sample.captions:
        yield json.dumps({"image": part.image_root + path, "caption": part.text(caption["text"])}) + "\n"


def llava_lines(part: Part, sample: Sample, path: str) -> Iterator[str]:
    """Conversations of one question, as LLaVA is pretrained on; the path is below its --image_folder."""
    name = path.rpartition("/")[2].partition(".")[0]
    for number, caption in enumerate(sample.captions):
        answer = part.text(caption["text"], partial(_TOKENS.sub, "< "))
        turns = [{"from": "human", "value": INSTRUCTION}, {"from": "gpt", "value": answer}]
        yield json.dumps({"id": f"{name}-{number}", "image": path, "conversations": turns}) + "\n"


def csv_lines(part: Part, sample: Sample, path: str) -> Iterator[str]:
    """As open_clip's `CsvDataset` reads them with its defaults."""
    for caption in sample.captions:
        yield _csv_line(part.image_root + path, part.text(caption["text"], csv_text))


def csv_text(text: str) -> str:
    """A text that pandas gives back and a spreadsheet does not execute; open_clip's tokenizer strips such spaces."""
    text = text.replace("\0", " ")
    text = f" {text}" if text.startswith(_FORMULA) else text
    return f"{text} " if text in MISSING else text


def _csv_line(*cells: str) -> str:
    line = io.StringIO()
    csv.writer(line, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
    return line.getvalue()


def join(name: str, out: StoragePath, parts: Iterable[Finished], _total: int) -> list[StoragePath]:
    """One list of the lines of all parts: a json's items, or the rows of a csv below their names."""
    as_json = name.endswith(".json")
    paths = (part.files[0] for part in parts)
    with atomic(out / name) as file:
        file.write(b"[" if as_json else _csv_line("filepath", "title").encode())
        separator = b"\n"
        for lines in map_concurrent(lambda path: path.read_bytes(), paths, isinstance(out, RemotePath)):
            if not as_json:
                shutil.copyfileobj(io.BytesIO(lines), file)
                continue
            for line in lines.splitlines():
                file.write(separator + line)
                separator = b",\n"
        if as_json:
            file.write(b"\n]\n")
    return [out / name]


def _form(lines: Lines, name: str) -> Form:
    return Form(partial(write, lines=lines), partial(join, name))


BLIP = _form(blip_lines, "captions.json")
LLAVA = _form(llava_lines, "conversations.json")
CSV = _form(csv_lines, "captions.csv")
