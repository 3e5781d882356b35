from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.sample import is_text
from capfilt.inference.captioners import prompts
from capfilt.inference.captioners.guard_rails import COPIES, MAX_ANSWER, RULES, copied_share, guard
from capfilt.inference.config import VlmConfig
from capfilt.runs.tally import no_text

ALL = VlmConfig()

CUT = [
    ("thinking", "<think>it may be a dog</think>A dog.", "A dog."),
    ("thinking", "it may be a dog</think>\n\nA dog.", "A dog."),
    ("fence", "```text\nA dog.\n```", "A dog."),
    ("preamble", "Sure! Here is a short description of the image: A dog.", "A dog."),
    ("preamble", "Caption: a dog.", "A dog."),
    ("preamble", "**Description:** A dog.", "A dog."),
    ("quotes", '"A dog runs."', "A dog runs."),
    ("quotes", "“A dog runs.”", "A dog runs."),
    ("opener", "The image shows a dog.", "A dog."),
    ("opener", "This picture depicts a dog.", "A dog."),
    ("opener", "In this image, we can see a dog.", "A dog."),
    ("opener", "This is a black and white photograph of a dog.", "A dog."),
    ("opener", "The photo appears to show a dog.", "A dog."),
    ("leak", "A dog. The alt text calls it Rex.", "A dog."),
]
KEPT = [
    "A dog.",
    "A sign says 'the image shows nothing'.",
    'A man reads "War and Peace" on a bench.',
    "A picture frame hangs on the wall.",
    "Image sensors on a circuit board.",
    "A caption is painted on the wall: never again.",
    "I love New York shirt on a hanger.",
    "Sorry sign hanging on a closed door.",
    "Here comes the bride, a cake topper.",
    "A great dane; certainly the largest dog of the show.",
    "Ein Hund läuft über die Wiese.",
    "一只狗在草地上奔跑。",
]
DROPPED = [
    ("refusal", "I'm sorry, but I can't help with that."),
    ("refusal", "As an AI language model, I cannot see images."),
    ("refusal", "I cannot identify people in this image."),
    ("refusal", "I am unable to describe this."),
    ("refusal", "Unfortunately, I don't see an image."),
    ("refusal", "No image was provided."),
    ("thinking", "<think>it may be a dog, or"),
    ("leak", "The provided text says it is a dog."),
]


@pytest.mark.parametrize(("rule", "answer", "left"), CUT)
def test_what_is_cut_and_by_which_rule(rule: str, answer: str, left: str) -> None:
    assert guard(answer, ALL) == (left, f"cut: {rule}")
    without = VlmConfig(rules=tuple(other for other in RULES if other != rule))
    assert f"cut: {rule}" not in guard(answer, without).remark


@pytest.mark.parametrize("answer", KEPT)
def test_what_only_looks_like_it_stays(answer: str) -> None:
    assert guard(answer, ALL) == (answer, "")


@pytest.mark.parametrize(("rule", "answer"), DROPPED)
def test_what_is_dropped(rule: str, answer: str) -> None:
    assert guard(answer, ALL) == ("", f"caption dropped: {rule}")
    without = VlmConfig(rules=tuple(other for other in RULES if other != rule))
    assert guard(answer, without).text


@pytest.mark.parametrize("answer", ["", " \n", "...", "\x00\x07", "\ufffd"])
def test_an_answer_without_words_failed(answer: str) -> None:
    assert guard(answer, ALL) == ("", "caption failed: empty")


def test_several_rules_in_turn_are_all_named() -> None:
    answer = 'Sure! Here is the caption: "The image shows a dog on a lawn."'
    assert guard(answer, ALL) == ("A dog on a lawn.", "cut: preamble; cut: quotes; cut: opener")


def test_six_words_of_the_prompt_are_a_leak() -> None:
    asked = prompts.instruction(prompts.TEMPLATES["fuse"])
    echo = "A dog. Use the names and facts of the web page."
    assert guard(echo, ALL, asked) == ("A dog.", "cut: leak")
    assert guard("Use the names and facts you like.", ALL, asked).text == "Use the names and facts you like."
    assert guard("Answer with the description only, please.", ALL, asked).text


def test_stop_and_strip() -> None:
    config = VlmConfig(stop=("###", "\n\n"), strip=("Caption -", "END"))
    assert guard("caption - A dog.\n\nA cat.", config) == ("A dog.", "")
    assert guard("A dog. end ### more", config) == ("A dog.", "")


def test_a_copy_of_the_web_text_is_marked_and_kept() -> None:
    web = "Vintage red Schwinn bicycle 1962, original paint!"
    assert guard("Vintage red Schwinn bicycle 1962, original paint", ALL, web=web).remark == COPIES
    assert guard("A red bicycle leans on a wall.", ALL, web=web).remark == ""
    assert guard("Schwinn", ALL, web=web) == ("Schwinn", COPIES)
    assert guard("一只红色的自行车", ALL, web="一只红色的自行车!").remark == COPIES
    assert guard("A dog.", ALL, web="").remark == ""


def test_the_share_is_of_runs_of_three_words() -> None:
    assert copied_share("a b c d", "A, b c! e") == 0.5
    assert copied_share("a b", "b a") == 0.0
    assert copied_share("", "a") == 0.0
    assert copied_share("a", "") == 0.0


words = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    [answer for _, answer, _ in CUT] + KEPT + [answer for _, answer in DROPPED] + ["<think>", "</think>", "```", '"']
)


@given(parts=st.lists(words, max_size=5), web=words)
def test_a_guarded_answer_is_one_line_and_says_what_became_of_it(parts: list[str], web: str) -> None:
    text, remark = guard(" ".join(parts), ALL, "Describe it.", web)
    assert text == " ".join(text.split())
    assert is_text(text) == bool(text)
    assert bool(text) != bool(no_text(remark)), "no text, and only then a reason why"
    assert "\n" not in remark


@given(text=words, web=words)
def test_shares_lie_between_none_and_all(text: str, web: str) -> None:
    assert 0 <= copied_share(text, web) <= 1
    assert copied_share(text, text) in (0, 1)


@pytest.mark.parametrize("piece", ["<think>", '"', "here is ", "a" * 50 + ".", "</think>", "the alt ", "```", "I'm "])
def test_an_endless_answer_takes_no_time(piece: str) -> None:
    began = time.process_time()
    guard(piece * MAX_ANSWER, ALL, "Describe it.", "a")
    assert time.process_time() - began < 2
