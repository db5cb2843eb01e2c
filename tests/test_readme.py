"""The README is under test: its table of settings, the names it uses, its commands. So is the promise of one file without dependencies."""
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
    assert [(name, default, meaning.replace("\\|", "|")) for name, default, meaning in ROWS] == list(aiproxy.KNOBS)


def test_every_setting_named_in_the_readme_exists_and_the_other_way_round():
    assert set(re.findall(r"AIPROXY_[A-Z_]+[A-Z]", README)) == set(re.findall(r"AIPROXY_[A-Z_]+[A-Z]", SOURCE))


def test_every_provider_named_in_the_readme_exists():
    named = re.search(r"Other providers by name\n\(`AIPROXY_UPSTREAM=(.*?)\) or by base URL", README, re.S).group(1)
    assert set(re.findall(r"[a-z-]+", named.replace("`", ""))) <= set(aiproxy.PROVIDERS)


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
            assert name == "resource"       # not on Windows, and not needed there
            continue
        assert "site-packages" not in origin and "dist-packages" not in origin, name


def test_the_first_command_of_the_readme_runs_the_main_job():
    command = re.search(r"^    (python3 aiproxy.py --demo)$", README, re.M).group(1)
    with Program(*shlex.split(command)[2:]) as program:
        program.wait_for_line(program.errors, r"First event after")


SETTING = re.compile(r"((?:AIPROXY|CLOUDFLARE)_[A-Z_]+)=([^\s,]+(?:,(?![A-Z]+_)[^\s,]+)*)")
REAL = {"AIPROXY_KEY": "sk-0123456789", "CLOUDFLARE_ACCOUNT_ID": "0123456789abcdef", "CLOUDFLARE_API_TOKEN": "token-0123456789"}     # for what the README leaves out
BLOCKS = [(block, dict(SETTING.findall(block))) for block in re.findall(r"```sh\n(.*?)```", README, re.S)]
ENV_FILE = next(settings for block, settings in BLOCKS if block.startswith("AIPROXY_KEY=sk-...\nAIPROXY_CLIENT_KEYS="))


@pytest.mark.parametrize("settings", [settings for _, settings in BLOCKS if settings], ids=lambda settings: ",".join(settings))
def test_the_settings_in_the_readme_are_accepted(settings):
    settings = settings if "CLOUDFLARE_API_TOKEN" in settings else {**ENV_FILE, **settings}
    done = run_program("--check", env={**settings, **{name: REAL[name] for name in settings if name in REAL}})
    assert done.returncode == 0, done.stderr


def test_json_in_the_readme_parses():
    bodies = re.findall(r"-d '(\{.*?\})'", README, re.S)
    assert bodies and all(json.loads(body)["messages"] for body in bodies)


def test_every_message_that_the_readme_explains_is_one_of_ours_or_known():
    ours = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", README.partition("## When it does not work")[2].partition("## ")[0]))
    theirs = {"proxy_ignore_headers", "proxy_read_timeout", "unsupported_country_region_territory"}
    assert ours - theirs and all('"%s"' % code in SOURCE for code in ours - theirs), ours


def test_python_samples_parse():
    for sample in re.findall(r"```python\n(.*?)```", README, re.S):
        ast.parse(sample)
