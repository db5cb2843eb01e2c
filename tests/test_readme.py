"""The README is under test: its table of settings, the names it uses, its commands.

So is the promise of one file without dependencies.
"""

import ast
import json
import os
import re
import shlex
import sys

import pytest

import aiproxy
from support import PROGRAM, Program, run_program

ROOT = os.path.dirname(PROGRAM)
README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
SOURCE = open(PROGRAM, encoding="utf-8").read()
ROWS = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^|]*)`|) *\| (.*) \|$", README, re.M)


def test_the_table_of_settings_is_the_one_in_the_file():
    rows = [(name, default, meaning.replace("\\|", "|")) for name, default, meaning in ROWS]
    options = [(option.name, option.default, option.help) for option in aiproxy.OPTIONS]
    assert sorted(rows) == sorted(options)


def test_the_readme_and_the_file_name_the_same_settings():
    name = re.compile(r"AIPROXY_[A-Z_]+[A-Z]")
    assert set(name.findall(README)) == set(name.findall(SOURCE))


def test_every_provider_named_in_the_readme_exists():
    pattern = r"Other providers by name\n\(`AIPROXY_UPSTREAM=(.*?)\) or by base URL"
    names = re.search(pattern, README, re.S).group(1)

    assert set(re.findall(r"[a-z-]+", names.replace("`", ""))) <= set(aiproxy.PROVIDERS)


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
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
ENV_FILE_START = "AIPROXY_KEY=sk-...\nAIPROXY_CLIENT_KEYS="
ENV_FILE_BLOCK = next(block for block in BLOCKS if block.startswith(ENV_FILE_START))
ENV_FILE = dict(SETTING.findall(ENV_FILE_BLOCK))
SETTINGS = [dict(SETTING.findall(block)) for block in BLOCKS if SETTING.search(block)]


@pytest.mark.parametrize("settings", SETTINGS, ids=",".join)
def test_the_settings_in_the_readme_are_accepted(settings):
    if "CLOUDFLARE_API_TOKEN" not in settings:
        settings = {**ENV_FILE, **settings}

    real = {name: REAL[name] for name in settings if name in REAL}
    done = run_program("--check", env={**settings, **real})

    assert done.returncode == 0, done.stderr


SAMPLE_KEYS = re.findall(
    r"""(?:Bearer |(?:api_?[kK]ey|KEYS?|TOKEN)[=:] ?"?(?:\w+=)?)"""
    r"""([^\s"'`,;=|$:]+)(?![\w:-])""",
    README,
)


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


def test_every_error_code_that_the_readme_explains_exists():
    section = README.partition("## When it does not work")[2].partition("## ")[0]
    words = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", section))
    # words of nginx and of OpenAI
    words_of_others = {
        "proxy_ignore_headers",
        "proxy_read_timeout",
        "unsupported_country_region_territory",
    }
    codes = words - words_of_others

    assert codes, words
    assert all('"%s"' % code in SOURCE for code in codes), words


def test_python_samples_parse():
    for sample in re.findall(r"```python\n(.*?)```", README, re.S):
        ast.parse(sample)
