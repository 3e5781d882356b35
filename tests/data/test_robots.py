from __future__ import annotations

import time

import pytest

from capfilt.data.robots import Rule, permits, refused_directive, rules

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
    return permits(rules(text, agents), path)


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

    @pytest.mark.parametrize(
        ("pattern", "path", "fits"),
        [
            ("/a", "/abc", True), ("/a$", "/a", True), ("/a$", "/ab", False), ("/a*c", "/abbbc/d", True),
            ("/a*c$", "/abcd", False), ("/*/b/*.jpg", "/x/y/b/z.jpg", True), ("*", "/", True), ("/*b*b", "/xb", False),
            ("/a.c", "/abc", False), ("/%7Ejoe", "/~joe", False),
        ],
    )  # fmt: skip
    def test_patterns(self, pattern: str, path: str, fits: bool) -> None:
        assert Rule(False, pattern).fits(path) is fits

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

    def test_a_hostile_pattern_takes_no_time(self) -> None:
        text = "User-agent: *\nDisallow: /" + "*a" * 2000 + "b\n"
        begun = time.process_time()
        assert allowed(text, "/" + "a" * 5000)
        assert time.process_time() - begun < 1


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
