from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import pytest

from capfilt.downloading.http.robots import MAX_ROBOTS, parse, permits, refused_directive

US = ("capfilt", "mybot")
TEXT = """
# a comment
User-agent: otherbot
Disallow: /

User-Agent: CapFilt   # ours
User-agent: thirdbot
Disallow: /private
Allow: /private/shared
Disallow: /*.gif$

User-agent: *
Disallow: /everyone
"""


def allowed(text: str, path: str, agents: tuple[str, ...] = ("capfilt",)) -> bool:
    return permits(parse(text, agents), path)


class TestRobotsTxt:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/", True), ("/x.jpg", True), ("/private", False), ("/private/a.jpg", False), ("/privately", False),
            ("/private/shared/a.jpg", True), ("/a.gif", False), ("/a.gif?x", True), ("/everyone/a.jpg", True),
        ],
    )  # fmt: skip
    def test_the_longest_rule_of_our_own_group_decides(self, path: str, expected: bool) -> None:
        assert allowed(TEXT, path) is expected

    def test_who_is_not_named_keeps_to_the_star(self) -> None:
        assert not allowed(TEXT, "/everyone/a.jpg", ("stranger",))
        assert allowed(TEXT, "/private", ("stranger",))
        assert not allowed(TEXT, "/x", ("stranger", "otherbot"))

    def test_two_names_of_ours_share_their_rules(self) -> None:
        text = "User-agent: capfilt\nDisallow: /a\nUser-agent: mybot\nDisallow: /b\nUser-agent: *\nDisallow: /c"
        assert [allowed(text, path, US) for path in ("/a", "/b", "/c")] == [False, False, True]

    def test_groups_of_one_name_are_one(self) -> None:
        text = "User-agent: capfilt\nDisallow: /a\nUser-agent: x\nDisallow: /\nUser-agent: CAPFILT\nDisallow: /b"
        assert [allowed(text, path) for path in ("/a", "/b", "/c")] == [False, False, True]

    @pytest.mark.parametrize("name", ["cap", "c", "capfilt2", "bot", "capfilt*"])
    def test_a_name_that_is_a_part_of_ours_is_not_ours(self, name: str) -> None:
        assert not allowed(f"User-agent: {name}\nAllow: /\n\nUser-agent: *\nDisallow: /", "/x", US)

    def test_lines_that_are_no_rules_end_no_group(self) -> None:
        assert not allowed("User-agent: capfilt\nCrawl-delay: 5\nUser-agent: x\nDisallow: /", "/x")

    @pytest.mark.parametrize(
        ("pattern", "path", "matches"),
        [
            ("/a", "/abc", True), ("/a$", "/a", True), ("/a$", "/ab", False), ("/a*c", "/abbbc/d", True),
            ("/a*c$", "/abcd", False), ("/*/b/*.jpg", "/x/y/b/z.jpg", True), ("*", "/", True), ("/*b*b", "/xb", False),
            ("/a.c", "/abc", False), ("/%7Ejoe", "/~joe", True), ("/a%2fb", "/a%2Fb", True),
            # The RFC's own: an escaped star or dollar is a letter like any other.
            ("/file-%2A.html", "/file-*.html", True), ("/file-%2A.html", "/file-x.html", False),
            ("/x%24", "/x$", True), ("/x%24", "/x", False), ("/a?b=*&c", "/a?b=1&c", True), ("/a", "/A", False),
        ],
    )  # fmt: skip
    def test_patterns(self, pattern: str, path: str, matches: bool) -> None:
        assert allowed(f"User-agent: *\nDisallow: {pattern}", path) is not matches

    def test_escapes_do_not_matter_but_for_the_slash(self) -> None:
        assert not allowed("User-agent: *\nDisallow: /%7Ejoe/ä", "/~joe/%C3%A4")
        assert allowed("User-agent: *\nDisallow: /a/b", "/a%2Fb")

    def test_of_two_as_long_the_kinder_holds(self) -> None:
        assert allowed("User-agent: *\nDisallow: /a\nAllow: /a", "/a")

    @pytest.mark.parametrize("text", ["", "nonsense", "Disallow: /", "User-agent: *\nDisallow:", "\ufeff# only a mark"])
    def test_what_forbids_nothing(self, text: str) -> None:
        assert allowed(text, "/x")

    def test_a_byte_order_mark_hides_nothing(self) -> None:
        assert not allowed("\ufeffUser-agent: *\nDisallow: /", "/x")

    @pytest.mark.parametrize(
        "path", ["//[x", "//host:port/x", "/%zz", "/" + "%" * 99, "/\ufffd", "/x#y", "/?", "/;a?b?c"]
    )
    def test_strange_paths_are_answered(self, path: str) -> None:
        assert allowed("User-agent: *\nDisallow: /nowhere", path)
        assert not allowed("User-agent: *\nDisallow: /", path)

    @pytest.mark.parametrize(
        "lines",
        [
            ["Disallow: /" + "*a" * 250_000 + "b"],
            (f"Disallow: *{'a' * 40}b{'a' * 40}" for _ in itertools.count()),
            (f"Disallow: /{'*a' * 50}b{i}" for i in itertools.count()),
            (f"Disallow: /b{i}$%" for i in itertools.count()),
            itertools.chain(
                (f"User-agent: b{i}" for i in range(12_000)), (f"Disallow: /{i}" for i in itertools.count())
            ),
            itertools.chain(["User-agent: capfilt"] * 12_000, (f"Disallow: /{i}" for i in itertools.count())),
            (f"User-agent: capfilt\nDisallow: /{i}" for i in itertools.count()),
        ],
        ids=[
            "one-pattern",
            "repeated-parts",
            "many-patterns",
            "escapes",
            "names-above-rules",
            "our-name-above-rules",
            "groups",
        ],
    )
    def test_a_hostile_file_is_read_and_asked_in_seconds(self, lines: Iterable[str]) -> None:
        """Every name of a group with every rule of it would be 250 million rules; a greedy matcher never returns."""
        text, size = ["User-agent: *"], 0
        for line in lines:
            if (size := size + len(line) + 1) > MAX_ROBOTS - 100:
                break
            text.append(line)
        begun = time.process_time()
        assert allowed("\n".join(text), "/" + "a" * 8000, US)
        assert time.process_time() - begun < 5


class TestHeader:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([], ""),
            (["all"], ""),
            (["noindex"], "noindex"),
            (["nofollow, NoAI"], "noai"),
            (["none"], "noindex"),
            (["otherbot: noindex"], ""),
            (["otherbot: nofollow, noindex"], ""),
            (["capfilt: noimageai"], "noimageai"),
            (["MyBot: noai"], "noai"),
            (["*: noindex"], "noindex"),
            (["otherbot: noindex", "noai"], "noai"),
            # img2dataset takes "unavailable_after" for the name of a robot and misses what follows.
            (["unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"], "noindex"),
            (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
            (["max-snippet: 20, noimageindex"], "noimageindex"),
            (["unavailable_after: 25 Jun 2030 15:00:00 PST"], ""),
            (["otherbot: max-snippet: 5, noindex"], ""),
            (["noindexing"], ""),
            ([""], ""),
        ],
    )
    def test_directives_that_refuse(self, values: list[str], expected: str) -> None:
        refused = {"noai", "noimageai", "noindex", "noimageindex"}
        assert refused_directive(values, US, refused) == expected

    def test_nothing_refuses_where_nothing_is_asked_for(self) -> None:
        assert refused_directive(["noindex"], US, set()) == ""
