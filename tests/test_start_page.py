"""The start page: what a browser gets at /, in English or in Chinese."""

import re

import pytest

import aiproxy

HTML = ("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")
MARKED = re.compile("{{(.+?)}}")


@pytest.fixture(scope="module")
def marked():
    return set(MARKED.findall(aiproxy.PAGE)) - {"NONCE"}


def test_each_marked_word_has_a_chinese_one_and_no_other_is_there(marked):
    assert marked == set(aiproxy.CHINESE)


def test_no_word_ends_the_text_or_the_string_that_it_stands_in(marked):
    for word in marked | set(aiproxy.CHINESE.values()):
        assert not re.search("[\"`<>&\\\\\n{}$]", word), word


def test_chinese_sentences_have_full_width_punctuation():
    for word in aiproxy.CHINESE.values():
        assert not re.search("[\u4e00-\u9fff][,.;:!?()]|[,;:!?()][\u4e00-\u9fff]", word), word


def test_the_page_has_at_most_200_lines_of_100_columns():
    lines = aiproxy.PAGE.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("languages,lang,send", [
    ("zh-CN", "zh-CN", "发送"),
    ("zh-CN,zh;q=0.9,en;q=0.8", "zh-CN", "发送"),
    ("ZH", "zh-CN", "发送"),
    ("zh-Hant-TW,en;q=0.5", "zh-CN", "发送"),
    ("en-US,en;q=0.9,zh-CN;q=0.8", "en", "Send"),
    ("de", "en", "Send"),
    ("*", "en", "Send"),
    ("", "en", "Send"),
    (None, "en", "Send"),
])
def test_the_page_speaks_the_language_that_the_browser_prefers(relay, languages, lang, send):
    fields = [HTML] if languages is None else [HTML, ("Accept-Language", languages)]
    reply = relay().ask("GET", "/", fields=fields)
    page = reply.body.decode()

    assert reply.get("content-type") == "text/html; charset=utf-8"
    assert reply.get("vary").startswith("Accept, Accept-Language")
    assert page.startswith('<!doctype html><html lang="%s">' % lang)
    assert '<button id="send">%s</button>' % send in page
    assert "{{" not in page


@pytest.mark.parametrize("language", ["zh-CN", "en"])
def test_a_program_gets_json_in_any_language(relay, language):
    reply = relay().ask("GET", "/", fields=[("Accept-Language", language), ("Accept", "*/*")])
    assert reply.json["name"] == "aiproxy"


def test_the_nonce_is_another_each_time_and_the_only_one(relay):
    running = relay()
    nonces = []
    for reply in [running.ask("GET", "/", fields=[HTML]) for _ in range(2)]:
        found = set(re.findall('nonce="(.*?)"', reply.body.decode()))
        assert len(found) == 1
        nonces += found
        assert "'nonce-%s'" % nonces[-1] in reply.get("content-security-policy")
    assert nonces[0] != nonces[1]
