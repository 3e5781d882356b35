"""BLEU-4 and CIDEr against pycocoevalcap's own numbers and against the formulas written out slowly."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import DataError
from capfilt.evaluation.metrics import captioning

CANDIDATES = [
    "a brown dog runs on the beach",
    "two men playing a game of tennis on a court",
    "a plate of food with rice and vegetables",
    "a cat",
    "a red bus driving down a city street with people waiting on the side of the street",
    "a red bus driving down a city street with people waiting on the side of the street",
]
REFERENCES = [
    [
        "a dog runs along the beach",
        "a brown dog running on sand near the water",
        "the dog is on the beach",
        "a wet brown dog runs by the sea",
        "dog at the beach",
    ],
    [
        "two men play tennis on a court",
        "a man hitting a tennis ball with a racket",
        "two tennis players in a game of doubles",
        "men playing a game of tennis on a blue court",
        "a tennis match between two men",
    ],
    [
        "a plate of rice and vegetables",
        "a plate with rice broccoli and meat on a table",
        "a white plate of food with a fork",
        "rice with vegetables on a plate",
        "a meal of rice and vegetables served on a white plate",
    ],
    [
        "a black cat sleeping on a sofa",
        "a cat lies on the couch",
        "a cat curled up on a couch",
        "the cat is asleep",
        "black cat on a grey sofa",
    ],
    [
        "a red bus driving down a city street",
        "a red double decker bus on a street",
        "people waiting for a red bus",
        "a bus drives past people on the side of the street",
        "a bus in the city",
    ],
    [
        "a horse standing in a field of grass",
        "a brown horse grazes in a green field",
        "a horse eating grass in the field",
        "the brown horse is in a field",
        "a lone horse in a meadow",
    ],
]
FEWER = [texts[: index + 1] for index, texts in enumerate(REFERENCES[:5])]
CLOSE_CANDIDATES = ["a small dog runs fast over grass", "a man rides a horse"]
CLOSE_REFERENCES = [
    ["a small dog runs fast over the wet grass", "a small dog runs fast"],
    ["a man rides a horse today", "a man rides horses"],
]

# pip install pycocoevalcap==1.2, then with gts = {i: references[i]} and res = {i: [candidates[i]]}:
#   Bleu(4).compute_score(gts, res, verbose=0)[0][3], Cider().compute_score(gts, res)[0]
# (the texts are lower-case words already, so no tokenizer takes part).
GOLDEN = [
    pytest.param(CANDIDATES, REFERENCES, 0.5320430493832897, 1.851645052257054, id="five references"),
    pytest.param(["", *CANDIDATES[1:]], REFERENCES, 0.5303938466353152, 1.4335795440648047, id="an empty caption"),
    pytest.param(
        [*CANDIDATES[:3], "a cat on a", CANDIDATES[4]],
        FEWER,
        0.5367649935411437,
        2.2053856836209413,
        id="one to five references",
    ),
    pytest.param(CLOSE_CANDIDATES, CLOSE_REFERENCES, 0.900051435812746, 6.682572327949925, id="equally close lengths"),
]

text = st.lists(st.sampled_from(list("abcdef")), max_size=9).map(" ".join)
corpus = st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=2, max_size=5)


@pytest.mark.parametrize(("candidates", "references", "bleu", "cider"), GOLDEN)
def test_scores_are_those_of_pycocoevalcap(
    candidates: list[str], references: list[list[str]], bleu: float, cider: float
) -> None:
    # BLEU only to 1e-7: the original adds 1e-9 to each denominator.
    assert captioning.bleu4(candidates, references)["bleu4"] == pytest.approx(100 * bleu, rel=1e-7)
    assert captioning.cider(candidates, references)["cider"] == pytest.approx(100 * cider, rel=1e-12)


def grams(tokens: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def textbook_bleu4(pairs: list[tuple[str, list[str]]]) -> float:
    product, length, wanted = 1.0, 0, 0
    for order in (1, 2, 3, 4):
        right = total = 0
        for candidate, references in pairs:
            candidate_tokens = grams(candidate.split(), order)
            total += len(candidate_tokens)
            for gram in set(candidate_tokens):
                right += min(
                    candidate_tokens.count(gram), max(grams(text.split(), order).count(gram) for text in references)
                )
        product *= right / total if total else 0.0
    for candidate, references in pairs:
        size = len(candidate.split())
        length += size
        wanted += sorted((len(text.split()) for text in references), key=lambda n: (abs(n - size), n))[0]
    if product == 0:
        return 0.0
    return 100 * product**0.25 * (1.0 if length >= wanted else math.exp(1 - wanted / length))


def textbook_cider(pairs: list[tuple[str, list[str]]]) -> float:
    scores = []
    for candidate, references in pairs:
        score = 0.0
        for reference in references:
            gap = len(candidate.split()) - len(reference.split())
            for order in (1, 2, 3, 4):
                candidate_tokens, wanted = (
                    Counter(grams(candidate.split(), order)),
                    Counter(grams(reference.split(), order)),
                )
                idf = {}
                for gram in candidate_tokens | wanted:
                    holds = sum(any(gram in grams(text.split(), order) for text in texts) for _, texts in pairs)
                    idf[gram] = math.log(len(pairs)) - math.log(max(1, holds))
                dot = sum(min(candidate_tokens[g], wanted[g]) * idf[g] * wanted[g] * idf[g] for g in idf)
                norm_candidate = math.sqrt(sum((candidate_tokens[g] * idf[g]) ** 2 for g in idf))
                norm_wanted = math.sqrt(sum((wanted[g] * idf[g]) ** 2 for g in idf))
                if norm_candidate > 0 and norm_wanted > 0:
                    score += dot / norm_candidate / norm_wanted * math.exp(-(gap**2) / 72) / 4 / len(references)
        scores.append(10 * score)
    return 100 * sum(scores) / len(scores)


@settings(max_examples=60, deadline=None)
@given(corpus)
def test_scores_are_the_textbook_formulas(pairs: list[tuple[str, list[str]]]) -> None:
    candidates, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert captioning.bleu4(candidates, references)["bleu4"] == pytest.approx(textbook_bleu4(pairs), abs=1e-9)
    assert captioning.cider(candidates, references)["cider"] == pytest.approx(textbook_cider(pairs), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(corpus, st.randoms(use_true_random=False))
def test_the_order_of_images_and_references_does_not_matter(pairs, random) -> None:
    shuffled = [(candidate, random.sample(texts, len(texts))) for candidate, texts in pairs]
    random.shuffle(shuffled)
    for measure in (captioning.bleu4, captioning.cider):
        (before,) = measure([c for c, _ in pairs], [r for _, r in pairs]).values()
        (after,) = measure([c for c, _ in shuffled], [r for _, r in shuffled]).values()
        assert after == pytest.approx(before, abs=1e-9)


def test_repeating_the_one_reference_earns_everything() -> None:
    texts = ["a dog runs on the beach", "two men play tennis outside"]
    references = [[text] for text in texts]
    assert captioning.bleu4(texts, references)["bleu4"] == pytest.approx(100)
    assert captioning.cider(texts, references)["cider"] == pytest.approx(1000)


def test_no_common_4gram_is_zero_not_a_smoothed_something() -> None:
    assert captioning.bleu4(["a dog runs"], [["a dog runs"]]) == {"bleu4": 0.0}
    assert captioning.bleu4(["", ""], [["a dog"], ["a cat"]]) == {"bleu4": 0.0}


def test_what_cannot_be_measured_is_absent() -> None:
    assert captioning.bleu4([], []) == {}
    assert captioning.cider([], []) == {}
    assert captioning.cider(["a dog runs"], [["a dog runs"]]) == {}
    assert captioning.diversity([]) == {}
    assert captioning.diversity(["", ""]) == {"repeated": 1.0}
    assert captioning.diversity(["dog", "cat"]) == {"distinct1": 1.0, "repeated": 0.0}


@pytest.mark.parametrize("measure", [captioning.bleu4, captioning.cider])
def test_faulty_references_are_refused(measure) -> None:
    with pytest.raises(DataError, match="2 captions but references for 1 images"):
        measure(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="image 1 has no reference"):
        measure(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="image 0 are one string"):
        measure(["a", "b"], ["a dog", ["b"]])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog isn't THERE.", "a man 's dog is n't there"),
        ("It\u2019s a t-shirt (really) -- 3.5 inches; 1,000!", "it 's a t-shirt really 3.5 inches 1,000"),
        ("people/kids at 3:30, $5 & up?", "people/kids at 3:30 $ 5 & up"),
        ("\u201co'clock\u201d the dogs' 3d end...", "o'clock the dogs 3d end"),
        ("caf\u00e9 \u72d7", "caf\u00e9 \u72d7"),
        (" \t\n...!?", ""),
    ],
)
def test_words(caption: str, expected: str) -> None:
    assert captioning.words(caption) == expected.split()


@settings(deadline=None)
@given(st.text(max_size=60))
def test_words_take_any_text_and_hold_no_space(caption: str) -> None:
    tokens = captioning.words(caption)
    assert all(token and not any(char.isspace() for char in token) for token in tokens)
    assert len("".join(tokens)) <= len(caption.lower())


def test_punctuation_and_case_change_no_score() -> None:
    loud = [text.upper() + "!" for text in CANDIDATES]
    assert captioning.bleu4(loud, REFERENCES) == captioning.bleu4(CANDIDATES, REFERENCES)
    assert captioning.cider(loud, REFERENCES) == captioning.cider(CANDIDATES, REFERENCES)


def test_diversity() -> None:
    # 7 words, 3 different; 4 bigrams (a dog three times, dog runs), 2 different; "a dog" is written twice.
    assert captioning.diversity(["a dog", "A dog.", "a dog runs"]) == {
        "distinct1": pytest.approx(3 / 7),
        "distinct2": pytest.approx(2 / 4),
        "repeated": pytest.approx(2 / 3),
    }


class TestScriptsWithoutSpaces:
    """Their captions are scored by character: a perfect one as a perfect one of as many English words."""

    ENGLISH = ("a dog sits on the bench", "two red cars drive by now", "she reads one old thick book")
    OTHERS = {
        "Chinese": ("一只狗坐着。", "两辆红车开过", "她读一本旧书"),
        "Japanese": ("犬がベンチに", "赤い車が二台", "彼女は本を読"),
        "Thai": ("แมวอยู่บน", "รถแดงคั", "เธออ่าน"),
        "Lao": ("ໝານັ່ງເທ", "ລົດແດງສອ", "ນາງອ່ານປ"),
        "Khmer": ("ឆ្កែអង្គុយ", "រថយន្តក្រ", "នាងអានសៀវ"),
        "Myanmar": ("ခွေးထိုင်နေ", "ကားနီနှစ်", "သူမစာဖတ်"),
    }

    @pytest.mark.parametrize("script", OTHERS)
    def test_a_perfect_caption_is_perfect(self, script: str) -> None:
        texts = self.OTHERS[script]
        assert captioning.bleu4(texts, [[text] for text in texts])["bleu4"] == pytest.approx(100)
        assert captioning.cider(texts, [[text] for text in texts])["cider"] > 900
        assert captioning.tokenisation(texts) == "characters"
        one_off = [text[:-1] for text in texts]
        assert 50 < captioning.bleu4(one_off, [[text] for text in texts])["bleu4"] < 100

    def test_as_a_perfect_english_one_of_as_many_words(self) -> None:
        figures = [
            captioning.cider(texts, [[text] for text in texts])["cider"]
            for texts in (self.ENGLISH, self.OTHERS["Chinese"])
        ]
        english, chinese = figures
        assert chinese == pytest.approx(english, rel=0.15)
        assert captioning.tokenisation(self.ENGLISH) == "words"

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("一只狗，2只猫。", "一 只 狗 2 只 猫"),
            ("ベンチのTシャツ", "ベ ン チ の t シ ャ ツ"),
            ("「ラーメン」を", "ラ ー メ ン を"),
            ("อยู่บนเก้าอี้", "อ ยู่ บ น เ ก้ า อี้"),
            ("벤치에 앉은 여자", "벤치에 앉은 여자"),
            ("लाल गाड़ी।", "लाल गाड़ी"),
            ("قطة على كرسيّ،", "قطة على كرسيّ"),
            ("một người phụ nữ", "một người phụ nữ"),
        ],
    )
    def test_by_example(self, text: str, tokens: str) -> None:
        assert captioning.words(text) == tokens.split()

    def test_mixed_texts_are_said_to_be(self) -> None:
        assert captioning.tokenisation(["a dog", "一只狗"]) == "words and characters"
        assert captioning.tokenisation([]) == "words"
