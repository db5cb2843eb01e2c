"""The README is under test: its table of settings, the names it uses, its commands.

So are its two halves, which must say the same in English and in Chinese, and the promise of one
file without dependencies. The recipes of "You come from" have a file of their own; tests/real/
runs the samples and the fronts.
"""

import ast
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import threading

import pytest

import aiproxy
from support import CHAT, PROGRAM, Client, Program, Upstream, make_certificate, run_program

ROOT = os.path.dirname(PROGRAM)
README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
SOURCE = open(PROGRAM, encoding="utf-8").read()
CELL = r"((?:[^|\\]|\\.)*)"
ROW = r"^\| `([A-Z_]+)` \| (?:`([^|]*)`|) *\| %s \| %s \|$" % (CELL, CELL)
ROWS = re.findall(ROW, README, re.M)
CHINESE = re.compile("[\u4e00-\u9fff]")

# The two halves, and by its heading the text of each section.
ENGLISH = README[README.index("\n## English\n"):README.index("\n## 中文\n")]
MANDARIN = README[README.index("\n## 中文\n"):README.index("\n## Files ")]
HALVES = pytest.mark.parametrize("half", [ENGLISH, MANDARIN], ids=["English", "Chinese"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def sections(text):
    """The text of each section by its heading, in order."""
    parts = re.split(r"^### (.*)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def section(half, english, chinese):
    return sections(half)[english if half is ENGLISH else chinese]


def code_words(pattern, text):
    """What stands in backticks and has this form."""
    return set(re.findall("`(%s)`" % pattern, BLOCK.sub("", text)))


def test_the_table_of_settings_is_the_one_in_the_file():
    rows = [(name, default, meaning.replace("\\|", "|")) for name, default, meaning, _ in ROWS]
    options = [(option.name, option.default, option.help) for option in aiproxy.OPTIONS]
    assert sorted(rows) == sorted(options)


def test_each_setting_is_explained_in_chinese():
    assert [name for name, _, _, meaning in ROWS if not CHINESE.search(meaning)] == []


def test_the_readme_is_short_and_no_line_is_wide_but_in_tables():
    lines = README.splitlines()
    assert len(lines) <= 500
    assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []


def test_the_top_has_both_languages_and_links_to_both_halves():
    top = README.partition("\n## ")[0]
    assert CHINESE.search(top)
    assert "[English](#english)" in top
    assert "[中文](#中文)" in top


def test_each_link_leads_to_a_heading():
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", README), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors


def test_both_halves_have_the_same_sections_blocks_and_tables():
    def shape(half):
        return [
            (
                BLOCK.findall(text) and [language for language, _ in BLOCK.findall(text)],
                len(re.findall(r"^\|", text, re.M)),
                len(re.findall(r"^(?:- )?\*\*", text, re.M)),
            )
            for text in sections(half).values()
        ]

    assert len(sections(ENGLISH)) >= 10
    assert shape(ENGLISH) == shape(MANDARIN)


def test_both_halves_name_the_same_settings_codes_and_links():
    for pattern in (r"(?:AIPROXY|CLOUDFLARE)_[A-Z_]+[A-Z]", r"`[a-z]+_[a-z_]+`",
                    r"\b[1-5][0-9][0-9]\b"):
        assert set(re.findall(pattern, ENGLISH)) == set(re.findall(pattern, MANDARIN))
    links = [set(re.findall(r"\]\(#(.*?)\)", half)) for half in (ENGLISH, MANDARIN)]
    shared = {"systemd", "caddy", "nginx", "fetch", "docker", "kubernetes"}
    assert shared == links[0] & shared == links[1] & shared


def test_each_heading_and_table_of_the_chinese_half_is_in_chinese():
    headings = sections(MANDARIN)
    assert [heading for heading in headings if not CHINESE.search(heading)] == []
    assert not CHINESE.search(re.sub(r"\(#.*?\)", "", ENGLISH))


def test_each_block_is_of_a_kind_that_some_test_looks_at():
    languages = {language for language, _ in BLOCK.findall(README)}
    assert languages == {"sh", "ini", "caddy", "nginx", "js", "yaml", "python"}
    assert README.count("\n```") == 2 * len(BLOCK.findall(README))


def test_the_readme_and_the_file_name_the_same_settings():
    name = re.compile(r"AIPROXY_[A-Z_]+[A-Z]")
    of_files = {option + "_FILE" for option in aiproxy.FILE_OPTIONS}
    assert set(name.findall(README)) - of_files == set(name.findall(SOURCE)) - of_files


@HALVES
def test_every_provider_named_in_the_readme_exists(half):
    names = code_words("[a-z][a-z-]+", section(half, "Your provider", "接你的服务商"))
    assert len(names) > 10
    assert names - {"think", "qwen"} <= set(aiproxy.PROVIDERS)


def test_both_halves_name_the_same_providers():
    names = [code_words("[a-z][a-z-]+", section(half, "Your provider", "接你的服务商"))
             for half in (ENGLISH, MANDARIN)]
    assert names[0] - {"think"} == names[1] - {"qwen"}


@HALVES
def test_the_short_names_of_workers_ai_exist(half):
    text = section(half, "Your free quota", "用免费额度：Workers AI")
    names = code_words(r"[a-z]+-[a-z0-9.-]+", text)
    assert names <= set(aiproxy.WORKERS_ALIASES)
    assert all("`%s`" % name in text for name in aiproxy.WORKERS_ALIASES)


def test_the_file_imports_nothing_outside_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])

    for name in imported - set(sys.builtin_module_names):
        try:
            origin = __import__(name).__file__ or ""
        except ImportError:
            # not on Windows, and not needed there
            assert name == "resource"
            continue
        assert "site-packages" not in origin, name
        assert "dist-packages" not in origin, name


def test_the_first_command_of_the_readme_runs_the_main_job():
    command = re.search(r"^    (python3 aiproxy.py --demo)$", README, re.M).group(1)
    with Program(*shlex.split(command)[2:]) as program:
        program.wait_for_line(program.errors, r"First event after")


SETTING = re.compile(r"((?:AIPROXY|CLOUDFLARE)_[A-Z_]+)=([^\s,]+(?:,(?![A-Z]+_)[^\s,]+)*)")
# Values for those that the README leaves out.
REAL = {
    "AIPROXY_KEY": "sk-0123456789",
    "AIPROXY_CLIENT_KEYS": "app=ck-0123456789",
    "CLOUDFLARE_ACCOUNT_ID": "0123456789abcdef",
    "CLOUDFLARE_API_TOKEN": "token-0123456789",
}
ENV_FILE = dict(SETTING.findall(BLOCK.search(sections(ENGLISH)["Your page"])[2]))


def read_settings():
    """The settings that each block makes, with those of the file that it reads."""
    found = []
    for language, block in BLOCK.findall(README):
        settings = dict(SETTING.findall(block)) if language == "sh" else {}
        if language == "yaml":
            settings = dict(re.findall(r"name: (AIPROXY_\w+), value: ([^\s,}]+)", block))
        if settings and "aiproxy.env" in block:
            without_front = {**ENV_FILE, "AIPROXY_PORT": "", "AIPROXY_TLS_CERT": "",
                             "AIPROXY_TLS_KEY": ""}
            settings = {**without_front, **settings}
        if settings:
            found.append(settings)
    return found


SETTINGS = read_settings()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    files = make_certificate(str(tmp_path_factory.mktemp("certificate")))
    return dict(zip(("AIPROXY_TLS_CERT", "AIPROXY_TLS_KEY"), files))


@pytest.mark.parametrize("settings", SETTINGS, ids=",".join)
def test_the_settings_in_the_readme_are_accepted(settings, certificate):
    real = {**REAL, **certificate}
    environ = {name: real.get(name, value) for name, value in settings.items()}
    assert aiproxy.Settings(environ)


def test_the_first_settings_in_the_readme_are_accepted_by_the_program():
    done = run_program("--check", env={"AIPROXY_KEY": REAL["AIPROXY_KEY"]})
    assert done.returncode == 0, done.stderr


SAMPLE_KEYS = re.findall(
    r"""(?:Bearer |(?:api_?[kK]ey|(?<!TLS_)KEYS?|TOKEN)[=:] ?"?(?:\w+=)?)"""
    r"""([^\s"'`,;=|$:]+)(?![\w:-])""",
    README,
) + re.findall(r"[\w-]*long-random-string", README)


@pytest.mark.parametrize("name", ["AIPROXY_KEY", "AIPROXY_CLIENT_KEYS", "CLOUDFLARE_API_TOKEN"])
@pytest.mark.parametrize("key", sorted(set(SAMPLE_KEYS)))
def test_a_key_that_stands_in_the_readme_is_not_accepted(name, key):
    environ = {"AIPROXY_KEY": "sk-1", name: key, "AIPROXY_UPSTREAM": "openai"}
    if name.startswith("CLOUDFLARE"):
        environ.update(AIPROXY_UPSTREAM="workers-ai", CLOUDFLARE_ACCOUNT_ID="0123456789abcdef")

    with pytest.raises(aiproxy.SettingError, match=name):
        aiproxy.Settings(environ)


def test_json_in_the_readme_parses():
    bodies = re.findall(r"-d '(\{.*?\})'", README, re.S)

    assert bodies
    assert all(json.loads(body)["messages"] for body in bodies)


@HALVES
def test_every_error_code_that_the_readme_explains_exists(half):
    words = code_words("[a-z]+(?:_[a-z]+)+", section(half, "When it does not work", "出了问题"))
    # words of nginx and of OpenAI
    words_of_others = {"keepalive_timeout", "unsupported_country_region_territory"}
    codes = words - words_of_others

    assert len(codes) > 5, words
    assert all('"%s"' % code in SOURCE for code in codes), words


# Messages of browsers and of an SDK.
OTHERS_MESSAGES = {
    "Failed to fetch", "Load failed", "Connection error.",
    "Permission was denied for this request to access the loopback address space"}
CANNOT_LISTEN = "cannot listen on %s port %d: %s"
ADDRESS_IN_USE = CANNOT_LISTEN % ("127.0.0.1", 8000, os.strerror(errno.EADDRINUSE))


@HALVES
def test_the_messages_that_the_readme_explains_are_the_programs(half):
    rows = section(half, "When it does not work", "出了问题").strip().split("\n")[2:]
    quoted = {words for row in rows for words in re.findall("`(.*?)`", row.split("|")[1])}
    messages = {words for words in quoted if " " in words}
    assert OTHERS_MESSAGES < messages
    assert ADDRESS_IN_USE in messages
    source = re.sub(r'"\s*"', "", SOURCE)
    ours = messages - OTHERS_MESSAGES - {ADDRESS_IN_USE} | {CANNOT_LISTEN}
    assert [message for message in ours if message not in source] == []


@HALVES
def test_what_users_meet_first_is_explained(half):
    rows = section(half, "When it does not work", "出了问题").strip().split("\n")[2:]
    seen = "\n".join(row.split("|")[1] for row in rows)
    for word in ("Failed to fetch", "loopback address space", "Python 3.8", "502", "in use",
                 "CERTIFICATE_VERIFY_FAILED", "504", "model_not_allowed", "invalid_api_key"):
        assert word in seen
    assert any("model_not_allowed" in row and "Workers AI" in row for row in rows)


@HALVES
def test_the_line_that_sums_up_the_log_reads_what_the_log_writes(half):
    command = re.search(r"`journalctl -u aiproxy -o cat \| (awk .*?)`", half)[1]
    lines = ["Started aiproxy.", "2026-01-01T00:00:00Z ming tokens=1000+1000 ok"]
    for client, tokens in (("ming", (10, 5)), ("hong", (7, 1)), ("ming", (100, 20)),
                           ("hong", (None, None)), ("ming", None)):
        record = aiproxy.Record(client)
        record.model = '"prompt_tokens": 1000, "client": "hong"'
        record.count_tokens = tokens and (lambda: tokens)
        lines.append(json.dumps(record.as_dict(lambda text, most: text)))

    said = subprocess.run(shlex.split(command), input="\n".join(lines) + "\n", timeout=60,
                          stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout

    assert sorted(said.splitlines()) == ["hong 8", "ming 135"]


@HALVES
def test_the_command_that_lists_the_sections_finds_them(half):
    pattern = re.search(r"grep -n '(.*?)' aiproxy.py", half)[1]
    found = re.findall(pattern.replace(r"\{4\}", "{4}"), SOURCE, re.M)
    assert len(found) == len(re.findall("^# (?:----|====) ", SOURCE, re.M)) > 40


def test_what_answers_the_ten_lines_stands_in_the_section_named():
    starts = r"^# [-=]{4} (.*?) [-=]+$"
    titles = [""] + re.findall(starts, SOURCE, re.M)
    bodies = dict(zip(titles, re.split(starts, SOURCE, flags=re.M)[::2]))
    rows = re.findall(r"^\|[^|]*\|[^|]*\| ([A-Z][^|]*) \|$",
                      README[README.index("## Ten lines"):], re.M)
    assert len(rows) > 10
    for row in rows:
        for answer in row.split("; "):
            title, _, names = answer.partition(": ")
            body = "".join(text for name, text in bodies.items()
                           if name.partition(":")[0] == title)
            assert body, answer
            for name in re.findall("`(.*?)`", names):
                assert re.search(r"(def|class) %s\b" % name.rpartition(".")[2], body), answer


def test_the_ten_lines_run_when_they_are_pasted():
    sample = re.search(r"```python\n(.*?)```", README, re.S)[1]
    with Upstream() as upstream:
        sample = sample.replace("https://api.openai.com", upstream.url).replace("8000", "0")
        lines, serve = sample.rstrip().rsplit("\n", 1)
        names = {}
        exec(lines, names)
        server = eval(serve.replace(".serve_forever()", ""), names)
        names["Relay"].log_message = lambda *ignored: None
        with server:
            asking = threading.Thread(target=server.handle_request)
            asking.start()
            with Client(server.server_address) as client:
                client.request("POST", CHAT, b'{"model":"m"}', [("Host", "localhost")])
                reply = client.read_reply("POST")
            asking.join()
    assert (reply.status, reply.body) == (200, b'{"ok":true}')
    assert upstream.received[0].field("authorization") == "Bearer sk-..."
    assert len(re.search(r" *def do_POST.*?(?=\nhttp)", sample, re.S)[0].split("\n")) == 10
