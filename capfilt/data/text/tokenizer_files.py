"""The files in which BERT's tokenizers lie, read into an engine of the `tokenizers` library that obeys them.

`tokenizer.json` says everything. A `vocab.txt` says what the tokens are, and `tokenizer_config.json` beside it how a
text is cut: lower case, accents, Chinese characters; without it, as `bert-base-uncased` does. Where both stand, what
`tokenizer_config.json` says wins, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from capfilt.storage.documents import MODEL_BYTES, read_model_bytes, read_model_object

FULL, VOCABULARY, CONFIG = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"

NAMES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""The special tokens that are needed, by BERT's names."""

# Of `tokenizer_config.json`: what of BERT's normalizer each key sets.
_RULES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
# Classes of transformers that cut words as BERT's does; BertJapaneseTokenizer and its like have tools of their own.
_LIKE_BERT = ("Bert", "DistilBert", "Electra", "Blip", "PreTrained")


def wordpiece(vocab: dict[str, int], unk: str = NAMES["unk"], **rules: Any) -> Engine:
    """BERT's tokenizer over this vocabulary, built new; `rules` of its normalizer, which by default is that of
    `bert-base-uncased`."""
    engine = Engine(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(**rules)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finished(engine)


def finished(engine: Engine, decoder: decoders.Decoder | None = None) -> Engine:
    """The engine as it is used here: nothing is cut or padded, pieces are joined as BERT joins them or by another
    `decoder`, and a special token that is spelled in a text is ordinary characters."""
    engine.no_truncation()
    engine.no_padding()
    engine.decoder = decoder or decoders.WordPiece(prefix="##", cleanup=True)
    engine.encode_special_tokens = True
    return engine


def made(make: Callable[[], Engine]) -> Engine:
    """What `make` gives; ValueError, in one line, for whatever the library raises."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise ValueError(f"no tokenizer can be made of it ({' '.join(str(error).split())[:160]})") from None


def is_plain(engine: Engine, names: dict[str, str], special: Sequence[str]) -> bool:
    """Whether the vocabulary alone says all: texts are cut as `bert-base-uncased` cuts them, and `special` are the only
    tokens that stand beside the words."""
    usual = wordpiece({names["unk"]: 0}, unk=names["unk"])

    def settings(one: Engine) -> tuple[object, ...]:
        parts = (None if part is None else part.__getstate__() for part in (one.normalizer, one.pre_tokenizer))
        return (*parts, one.model.unk_token, one.model.max_input_chars_per_word)

    added = {token.content for token in engine.get_added_tokens_decoder().values()}
    return names == NAMES and settings(engine) == settings(usual) and added <= set(special)


def read(path: Path) -> tuple[Engine, dict[str, str]]:
    """The engine that a folder, a `vocab.txt` or a `tokenizer.json` describes, and the names of its special tokens.

    Raises:
        OSError: nothing of the kind there.
        ValueError: what cannot be obeyed, in one line.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((path / name for name in (FULL, VOCABULARY) if (path / name).is_file()), path / FULL)
    config = read_model_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    names = _names(folder, config)
    engine = _whole(path, config) if path.suffix == ".json" else _from_vocabulary(path, config, names["unk"])
    _add(engine, folder, config)
    wanted = config.get("do_lower_case")
    if isinstance(wanted, bool) and wanted != lower_cases(engine):
        raise ValueError(f"{CONFIG} says do_lower_case {json.dumps(wanted)} and the normalizer of {FULL} the contrary")
    return finished(engine), names


def lower_cases(engine: Engine) -> bool:
    """Whether a text's capitals are lost."""
    return engine.normalizer is not None and engine.normalizer.normalize_str("ABC") == "abc"


def _whole(path: Path, config: dict[str, Any]) -> Engine:
    tree = read_model_object(path, 4 * MODEL_BYTES)
    model = tree.get("model")
    model = model if isinstance(model, dict) else {}
    kind = model.get("type")
    if kind != "WordPiece":
        raise ValueError(f"a tokenizer of the kind {kind}; texts of BLIP are cut by WordPiece")
    if model.get("continuing_subword_prefix", "##") != "##":
        raise ValueError(f"pieces that go on with {model['continuing_subword_prefix']!r}; BERT's go on with '##'")
    normalizer = tree.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        tree["normalizer"] = normalizer | {_RULES[key]: config[key] for key in _RULES if key in config}
    return made(lambda: Engine.from_str(json.dumps(tree)))


def _from_vocabulary(path: Path, config: dict[str, Any], unk: str) -> Engine:
    entries = read_model_bytes(path).decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    name = str(config.get("tokenizer_class") or "Bert")
    if not name.startswith(_LIKE_BERT) or "Japanese" in name:
        raise ValueError(f"its texts are cut by {name} of transformers, of which there is no {FULL}")
    if config.get("do_basic_tokenize", True) is not True or config.get("never_split"):
        raise ValueError(f"{CONFIG} asks for do_basic_tokenize=false or never_split, of which there is no {FULL}")
    given = {field: config[key] for key, field in _RULES.items() if key in config}
    if wrong := [key for key, field in _RULES.items() if not isinstance(given.get(field, True), bool | None)]:
        raise ValueError(f"{CONFIG}: {wrong[0]} is neither true nor false")
    return wordpiece(numbered(entries), unk, **given)


def numbered(vocab: Sequence[str]) -> dict[str, int]:
    """Tokens -> ids. ValueError where a token stands twice."""
    ids = {token: index for index, token in enumerate(vocab)}
    if len(ids) != len(vocab):
        twice = next(token for index, token in enumerate(vocab) if ids[token] != index)
        raise ValueError(f"the vocabulary holds '{twice}' twice; every token stands for one id")
    return ids


def _names(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens' names: BERT's, or those that the folder has."""
    named = (read_model_object(folder / SPECIAL) if (folder / SPECIAL).is_file() else {}) | config
    names = {}
    for role, usual in NAMES.items():
        given = named.get(f"{role}_token") or usual
        given = given.get("content") if isinstance(given, dict) else given
        if not isinstance(given, str):
            raise ValueError(f"{role}_token is {given!r}, which is no token")
        names[role] = given
    return names


def _add(engine: Engine, folder: Path, config: dict[str, Any]) -> None:
    """Add the tokens that stand beside the vocabulary, each under its own id."""
    added = dict(read_model_object(folder / ADDED)) if (folder / ADDED).is_file() else {}
    described = config.get("added_tokens_decoder") or {}
    if not isinstance(described, dict) or not all(isinstance(one, dict) for one in described.values()):
        raise ValueError(f"{CONFIG}: added_tokens_decoder is no table of tokens by their ids")
    tokens = {int(index): one for index, one in described.items()}
    tokens |= {int(index): {"content": token} for token, index in added.items() if int(index) not in tokens}
    for index, one in sorted(tokens.items()):
        token = one.get("content")
        if not isinstance(token, str) or not token:
            raise ValueError(f"the added token of id {index} is {token!r}, which is no token")
        if engine.token_to_id(token) not in (None, index):
            raise ValueError(f"the added token {token!r} has the ids {engine.token_to_id(token)} and {index}")
        options = {key: bool(one[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in one}
        special = bool(one.get("special", False))
        add = engine.add_special_tokens if special else engine.add_tokens
        add([AddedToken(token, special=special, **options)])
        if engine.token_to_id(token) != index:
            raise ValueError(f"the added token {token!r} should have the id {index}, and {index - 1} is no token's")
