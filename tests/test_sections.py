"""Each section of part two can be taken out, and what is left is still a correct relay.

Below the line "# ==== Part two: Parts that can be taken out" each section of aiproxy.py begins with
a line "# ---- NAME ---". It has at most one entry elsewhere, a line that ends in
"# part two: NAME". The tests remove both, see that nothing else needs the section, and run tests
of the core on what is left. The tables below say which. A section that says "# Needs: OTHER" goes
with OTHER.
"""
import functools
import json
import os
import re
import subprocess
import symtable
import sys

import pytest

from support import HERE, PROGRAM

PART = "# ==== "
PART_TWO = "# ==== Part two: Parts that can be taken out "
SECTION = "# ---- "
HEADING = re.compile(r"# ---- (\S.*?) -+$")
ENTRY = re.compile(r"\s*[^\s#].*# part two: (.+)$")
LABEL = re.compile(r"# (Does|Touches|Entered|Needs): \S")
NEEDS = re.compile(r"# Needs: (.+)\.")
ALL = "all sections"

# The core in about two seconds. Left to the full run: tables of many cases that take one path
# through the code, 16 MB for a client that does not read, and all that needs a certificate.
CORE_TESTS = {
    "test_relay.py": (
        "test_the_header_field_of_the_provider_key_can_be_configured",
        "test_several_provider_keys_take_turns",
        "test_a_slightly_wrong_base_url_is_fixed_if_a_provider_key_is_configured",
        "test_with_a_provider_key_nothing_about_the_client_goes_up",
        "test_a_transparent_relay_sends_all_other_headers_up_unchanged",
        "test_end_to_end_headers_are_relayed_in_order_with_duplicates",
        "test_header_fields_that_contain_the_provider_key_are_not_relayed",
        "test_every_response_and_log_line_has_a_request_id",
        "test_a_response_to_HEAD_has_a_length_and_no_body",
        "test_interim_responses_are_not_relayed",
        "test_a_transparent_relay_passes_every_method",
    ),
    "test_streaming.py": (
        "test_an_event_is_relayed_before_the_next_one_is_sent",
        "test_an_http10_client_gets_the_stream_as_an_until_close_body",
        "test_event_streams_tell_proxies_in_front_not_to_buffer_them",
        "test_a_compressed_response_is_relayed_unchanged",
        "test_an_incomplete_content_length_body_stays_incomplete",
        "test_an_incomplete_chunked_body_gets_no_last_chunk",
        "test_a_stream_that_ends_early_between_events_gets_one_error_event",
        "test_a_stream_that_ends_early_inside_an_event_gets_no_error_event",
    ),
    "test_cancel.py": (
        "test_when_the_client_disconnects_the_upstream_connection_is_closed",
        "test_a_disconnect_during_an_upload_closes_the_upstream_connection",
        "test_a_disconnect_under_back_pressure_is_detected",
        "test_a_disconnect_does_not_affect_other_clients",
    ),
    "test_requests.py": (
        "test_a_truncated_request_is_not_sent_up",
        "test_a_body_without_a_length_is_read_as_a_malformed_next_request",
        "test_an_allowed_path_goes_up_byte_for_byte",
        "test_nothing_is_carried_out_after_a_refused_request",
    ),
}
WITHOUT_TLS = ("-k", "not tls")

# The assertions of four files are not rewritten, and of their functions only these are collected:
# either would take half as long as the tests.
CORE_NAMES = [name for names in CORE_TESTS.values() for name in names]
CORE_ARGUMENTS = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain", *WITHOUT_TLS]
CORE_ARGUMENTS += ["-o", "python_functions=" + " ".join(CORE_NAMES)]
CORE_ARGUMENTS += ["tests/" + file for file in CORE_TESTS]

DESELECTED = {      # section: tests of the core that cannot pass without it, and why
    "Another key header": {
        "test_relay.py::test_the_header_field_of_the_provider_key_can_be_configured":
        "it is that setting",
    },
    "Forgiving paths": {
        "test_relay.py::test_a_slightly_wrong_base_url_is_fixed_if_a_provider_key_is_configured":
        "it sends such paths",
    },
    "Patterns of paths": {
        "test_requests.py::test_an_allowed_path_goes_up_byte_for_byte": "it sets patterns",
    },
    "CORS": {
        "test_relay.py::test_with_a_provider_key_nothing_about_the_client_goes_up":
        "it sends an Origin, which is refused then",
        "test_relay.py::test_a_transparent_relay_sends_all_other_headers_up_unchanged":
        "it sets AIPROXY_ORIGINS",
        "test_relay.py::test_end_to_end_headers_are_relayed_in_order_with_duplicates":
        "it sets AIPROXY_ORIGINS",
        "test_relay.py::test_a_transparent_relay_passes_every_method":
        "it sets AIPROXY_ORIGINS",
    },
    "Event streams": {
        "test_streaming.py::test_a_stream_that_ends_early_between_events_gets_one_error_event":
        "it is that event",
        "test_streaming.py::test_event_streams_tell_proxies_in_front_not_to_buffer_them":
        "the section tells them",
    },
    "Several provider keys": {
        "test_relay.py::test_several_provider_keys_take_turns": "it configures two provider keys",
    },
}


def read_program():
    with open(PROGRAM, encoding="utf-8") as file:
        return file.read().split("\n")


def find_sections(lines):
    """The sections of part two: by name the range of their line numbers, with the heading."""
    sections = {}
    name = None
    in_part_two = False
    for number, line in enumerate(lines):
        if line.startswith(PART):
            in_part_two = line.startswith(PART_TWO)
            name = None
        elif in_part_two and line.startswith(SECTION):
            heading = HEADING.match(line)
            assert heading, "line %d is not the heading of a section: %s" % (number + 1, line)
            name = heading.group(1)
            assert name not in sections, "two sections are called " + name
            sections[name] = range(number, number)
        if name:
            sections[name] = range(sections[name].start, number + 1)
    return sections


def find_entries(lines):
    """Every line that enters a section: pairs of its number and the section's name."""
    matches = [(number, ENTRY.match(line)) for number, line in enumerate(lines)]
    return [(number, match.group(1)) for number, match in matches if match]


LINES = read_program()
SECTIONS = find_sections(LINES)
ENTRIES = find_entries(LINES)


def needed(name):
    """The sections that this one says it needs."""
    matches = [NEEDS.fullmatch(LINES[number]) for number in SECTIONS[name]]
    return [other for match in matches if match for other in match.group(1).split(", ")]


def with_dependents(names):
    """These sections, and all that need one of them."""
    names = set(names)
    while True:
        more = {name for name in SECTIONS if names & set(needed(name))} - names
        if not more:
            return names
        names |= more


def take_out(names):
    """Two lists of lines: aiproxy.py without these sections and their entries; the sections.

    What needs one of these sections goes as well.
    """
    numbers = set()
    names = with_dependents(names)
    for name in names:
        numbers.update(SECTIONS[name])
    removed = [LINES[number] for number in sorted(numbers)]

    numbers.update(number for number, name in ENTRIES if name in names)
    rest = [line for number, line in enumerate(LINES) if number not in numbers]
    return rest, removed


class Names:
    """The names that a piece of the program binds at top level, and those that it uses."""

    def __init__(self, lines):
        module = symtable.symtable("\n".join(lines), "aiproxy.py", "exec")
        symbols = module.get_symbols()
        self.defined = {symbol.get_name() for symbol in symbols
                        if symbol.is_assigned() or symbol.is_imported()}

        # The global names, in any scope. The compiler's own table of symbols tells them from
        # local names that are spelled alike.
        self.used = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
        scopes = module.get_children()
        while scopes:
            scope = scopes.pop()
            symbols = scope.get_symbols()
            self.used.update(symbol.get_name() for symbol in symbols if symbol.is_global())
            scopes.extend(scope.get_children())


INSIDE = {number for numbers in SECTIONS.values() for number in numbers}
PIECES = {**SECTIONS, None: [number for number in range(len(LINES)) if number not in INSIDE]}


def names_of(piece, taken_out):
    """The names of a section, or of all that stands outside, without the entries of these."""
    entries = [number for number, name in ENTRIES if name in taken_out]
    return names_without(piece, tuple(number for number in entries if number in PIECES[piece]))


@functools.lru_cache(None)
def names_without(piece, entries):
    return Names([LINES[number] for number in PIECES[piece] if number not in entries])


class CoreRuns:
    """Runs of the core's tests in processes of their own, beside the rest of the suite.

    conftest.py lets the first test start them and the tests that need their results come last.
    """

    def __init__(self, new_folder):
        # By name of a section, and for ALL.
        self.folders = {}
        for variant in (*SECTIONS, ALL):
            self.folders[variant] = str(new_folder("without"))
        self.statuses = {}
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "core_runs.py")], universal_newlines=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with self.process.stdin as file:
            json.dump([self.prepare(variant) for variant in self.folders], file)

    def prepare(self, variant):
        """Write aiproxy.py without these sections. Return its folder, and pytest's arguments."""
        names = list(SECTIONS) if variant == ALL else [variant]
        folder = self.folders[variant]
        with open(os.path.join(folder, "aiproxy.py"), "w", encoding="utf-8") as file:
            file.write("\n".join(take_out(names)[0]))

        # conftest.py and support.py take the program from the folder above their own.
        os.symlink(HERE, os.path.join(folder, "tests"))
        arguments = list(CORE_ARGUMENTS)
        for name in sorted(with_dependents(names)):
            for test in DESELECTED.get(name, ()):
                arguments += ["--deselect", "tests/" + test]
        return folder, arguments

    def result(self, variant):
        """The status of this run, and what it has printed. Waits for its end."""
        folder = self.folders[variant]
        while folder not in self.statuses:
            ended, status = json.loads(self.process.stdout.readline())
            self.statuses[ended] = status
        with open(os.path.join(folder, "output"), encoding="utf-8") as file:
            return self.statuses[folder], file.read()

    def end(self):
        """A run of the suite that was stopped early does not wait for them."""
        self.process.kill()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="session")
def core_runs(tmp_path_factory):
    runs = CoreRuns(tmp_path_factory.mktemp)
    yield runs
    runs.end()


def test_part_two_has_sections(core_runs):
    assert set(core_runs.folders) == {ALL, *SECTIONS}
    assert SECTIONS


def test_every_entry_names_a_section():
    assert {name for _, name in ENTRIES} <= set(SECTIONS)


def test_every_section_that_is_needed_exists():
    for name in SECTIONS:
        assert set(needed(name)) <= set(SECTIONS) - {name}


@pytest.mark.parametrize("file", list(CORE_TESTS))
def test_every_test_of_the_core_exists(file):
    with open(os.path.join(HERE, file), encoding="utf-8") as opened:
        names = re.findall(r"^def (test_\w+)\(", opened.read(), re.M)
    for name in CORE_TESTS[file]:
        assert [other for other in names if other.startswith(name)] == [name]


def test_every_deselected_test_is_one_of_the_core_and_its_section_exists():
    core = {"%s::%s" % (file, test) for file, tests in CORE_TESTS.items() for test in tests}
    assert set(DESELECTED) <= set(SECTIONS)
    for tests in DESELECTED.values():
        assert set(tests) <= core


@pytest.mark.parametrize("name", list(SECTIONS))
def test_a_heading_says_what_the_section_does_touches_and_where_it_is_entered(name):
    comment = []
    for number in SECTIONS[name][1:]:
        if not LINES[number].startswith("# "):
            break
        comment.append(LINES[number])
    matches = [LABEL.match(line) for line in comment]
    labels = [match.group(1) for match in matches if match]
    assert labels in (["Does", "Touches", "Entered"], ["Does", "Touches", "Entered", "Needs"])
    assert matches[0], "the comment does not begin with its label"


@pytest.mark.parametrize("name", list(SECTIONS))
def test_a_section_has_at_most_one_entry_and_it_stands_outside(name):
    entries = [number for number, entered in ENTRIES if entered == name]
    assert len(entries) <= 1
    assert not set(entries) & set(SECTIONS[name])


@pytest.mark.parametrize("name", list(SECTIONS) + [ALL])
def test_nothing_else_uses_a_name_of_a_section(name):
    taken_out = with_dependents(SECTIONS if name == ALL else [name])
    missing = set().union(*(names_of(piece, ()).defined for piece in taken_out))
    rest = [names_of(piece, taken_out) for piece in PIECES if piece not in taken_out]
    missing -= set().union(*(names.defined for names in rest))
    still_used = missing & set().union(*(names.used for names in rest))
    assert not still_used


@pytest.mark.parametrize("name,option", [
    ("Demo", "--demo"), ("Env files", "--env-file=aiproxy.env"), ("A live check", "--live"),
])
def test_an_option_goes_with_its_section(tmp_path, name, option):
    """One that were accepted and did nothing would relay without the settings that are meant."""
    program = tmp_path / "aiproxy.py"
    program.write_text("\n".join(take_out([name])[0]), encoding="utf-8")
    command = [sys.executable, str(program), "--check"]
    done = subprocess.run(command + [option], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"an option is not understood" in done.stderr
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", list(SECTIONS) + [ALL])
def test_the_relay_works_without_a_section(core_runs, name):
    status, output = core_runs.result(name)
    assert status == 0, output[-5000:]
