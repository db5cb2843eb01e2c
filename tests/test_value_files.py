"""A secret may stand in a file that NAME_FILE names, as Docker and Kubernetes mount them.

The file is read whenever the settings are, and nothing of it is ever shown.
"""

import pytest

import aiproxy

KEY = b"sk-hidden-key"
OPTIONS = ["AIPROXY_KEY", "AIPROXY_CLIENT_KEYS", "AIPROXY_UPSTREAM_HEADERS",
           "CLOUDFLARE_API_TOKEN"]


@pytest.fixture
def file(tmp_path):
    """file(content) returns the path of a file with these bytes."""

    def write(content, name="value"):
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write


# What a file holds, and the provider keys that it means.
CONTENTS = {
    "without a line end": (b"sk-1", [b"sk-1"]),
    "with a line end": (b"sk-1\n", [b"sk-1"]),
    "by line": (b"sk-1\nsk-2\n", [b"sk-1", b"sk-2"]),
    "by comma": (b"sk-1, sk-2", [b"sk-1", b"sk-2"]),
    "by both": (b"sk-1,sk-2\nsk-3,\n", [b"sk-1", b"sk-2", b"sk-3"]),
    "Windows' line ends": (b"sk-1\r\nsk-2\r\n", [b"sk-1", b"sk-2"]),
    "old line ends": (b"sk-1\rsk-2", [b"sk-1", b"sk-2"]),
    "a byte order mark": (b"\xef\xbb\xbfsk-1\r\n", [b"sk-1"]),
    "empty lines": (b"\n\n  sk-1  \n\nsk-2\n\n", [b"sk-1", b"sk-2"]),
    "comments": (b"# the first\nsk-1\n  # the second\nsk-2\n#sk-3\n", [b"sk-1", b"sk-2"]),
    "quotes": (b"\"sk-1\"\n'sk-2'\n", [b"sk-1", b"sk-2"]),
}


@pytest.mark.parametrize("content,keys", CONTENTS.values(), ids=list(CONTENTS))
def test_the_entries_of_a_file_stand_by_line_or_by_comma(file, content, keys):
    assert aiproxy.Settings({"AIPROXY_KEY_FILE": file(content)}).provider_keys == keys


def test_all_four_secrets_may_stand_in_files(file):
    client_keys = b"one=ck-one\r\n# since May\r\ntwo=ck-two\r\nck-three\r\n"
    settings = aiproxy.Settings({
        "AIPROXY_UPSTREAM": "workers-ai",
        "CLOUDFLARE_ACCOUNT_ID": "0123456789abcdef",
        "CLOUDFLARE_API_TOKEN_FILE": file(b"token-1\n", "token"),
        "AIPROXY_CLIENT_KEYS_FILE": file(client_keys, "client keys"),
        "AIPROXY_UPSTREAM_HEADERS_FILE": file(b"X-One: 1\nX-Two: a, b; X-Three: 3\n", "fields"),
    })

    assert settings.provider_keys == [b"token-1"]
    assert settings.client_keys == [("one", b"ck-one"), ("two", b"ck-two"),
                                    ("client3", b"ck-three")]
    assert settings.upstream_headers == [(b"X-One", b"1"), (b"X-Two", b"a, b"), (b"X-Three", b"3")]


def test_a_file_is_read_again_when_the_settings_are(file):
    environ = {"AIPROXY_KEY_FILE": file(b"sk-old")}
    assert aiproxy.Settings(environ).provider_keys == [b"sk-old"]

    file(b"sk-new")
    settings = aiproxy.Settings(environ)
    assert settings.provider_keys == [b"sk-new"]

    # Whoever reads them from what they were read from, gets the same.
    file(b"sk-newest")
    assert aiproxy.Settings(settings.environ).provider_keys == [b"sk-newest"]


# Files that cannot be used, and what the message says of them.
UNUSABLE = {
    "empty": (b"", "the file holds no value"),
    "only line ends and comments": (b"\n \r\n#s3cret-1\n", "the file holds no value"),
    "only commas": (b",,\n", "something between its commas"),
    "not UTF-8": (b"s3cret-\xff", "the file is no text in UTF-8"),
    "UTF-16": ("s3cret-1".encode("utf-16"), "the file is no text in UTF-8"),
    "UTF-16 without a mark": ("s3cret-1".encode("utf-16-le"), "the file is no text in UTF-8"),
    "a NUL": (b"s3cret-1\0", "the file is no text in UTF-8"),
    "a line of an env file": (b"AIPROXY_KEY=s3cret-1\n", "it takes the value alone"),
    "a space in a key": (b"s3cret 1", "visible ASCII"),
    "a placeholder": (b"your-api-key-here", "placeholder"),
    "too large": (b"s3cret-1\n" * 200000, "the file is larger than 1048576 bytes"),
}


@pytest.mark.parametrize("content,reason", UNUSABLE.values(), ids=list(UNUSABLE))
def test_a_file_that_cannot_be_used_stops_the_start_and_is_not_shown(file, content, reason):
    with pytest.raises(aiproxy.SettingError) as caught:
        aiproxy.Settings({"AIPROXY_KEY_FILE": file(content)})

    message = str(caught.value)
    assert message.startswith("AIPROXY_KEY_FILE: ")
    assert reason in message
    assert "s3cret" not in message and "your-api" not in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_a_file_that_is_not_there_stops_the_start_and_its_path_is_shown(tmp_path, name):
    path = str(tmp_path / "missing")
    with pytest.raises(aiproxy.SettingError) as caught:
        aiproxy.Settings({name + "_FILE": path})

    reason = "the file %s cannot be read: No such file or directory" % path
    assert str(caught.value) == "%s_FILE: %s" % (name, reason)


# What somebody may write where a path belongs, and whether it is shown.
PATHS = [
    ("/run/secrets/provider_key", True),
    ("secrets/provider", True),
    ("aiproxy.env", True),
    ("./key", True),
    ("C:\\Program Files\\aiproxy\\key.txt", True),
    ("/srv/\u5bc6\u94a5/key", True),
    ("s3cret", False),
    ("sk-s3cret", False),
    ("gsk_s3cret/abc", False),
    ("0123456789abcdef0123456789abcdef.s3cret", False),
    ("s3cret/AbCdEf+0123==", False),
    ("https://me:s3cret@host", False),
    ("-----BEGIN PRIVATE KEY-----\ns3cret/abc", False),
    ("alice=s3cret/abc", False),
]


@pytest.mark.parametrize("variable", ["AIPROXY_KEY_FILE", "AIPROXY_TLS_CERT", "--env-file"])
@pytest.mark.parametrize("path,is_shown", PATHS, ids=ascii)
def test_a_path_is_shown_unless_it_may_be_a_key(check, variable, path, is_shown):
    if variable.startswith("--"):
        status, out, err = check(variable, path)
    else:
        status, out, err = check(**{variable: path})

    assert (status, out) == (2, "")
    assert err.startswith("aiproxy: %s: the file " % variable)
    assert err.endswith("cannot be read: No such file or directory\n")
    assert (path in err) == is_shown
    assert "s3cret" not in err


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(aiproxy.SettingError, match="AIPROXY_KEY_FILE: the file .* cannot be read"):
        aiproxy.Settings({"AIPROXY_KEY_FILE": str(tmp_path)})


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_and_its_file_cannot_both_be_set(file, name):
    both = {name: "s3cret-1", name + "_FILE": file(b"s3cret-2")}
    with pytest.raises(aiproxy.SettingError) as caught:
        aiproxy.Settings(both)

    assert "%s and %s_FILE are both set" % (name, name) in str(caught.value)
    assert "s3cret" not in str(caught.value)

    # What is empty is not set.
    aiproxy.Settings({**both, name: "", name + "_FILE": ""})


@pytest.mark.parametrize("name,meant", [
    ("AIPROXY_MODELS_FILE", "AIPROXY_MODELS"),
    ("AIPROXY_KEYS_FILE", "AIPROXY_KEY_FILE"),
    ("AIPROXY_CLIENT_KEY_FILE", "AIPROXY_CLIENT_KEYS_FILE"),
    ("AIPROXY_RATE_FILE", "AIPROXY_RATE"),
])
def test_no_other_setting_may_stand_in_a_file(file, name, meant):
    with pytest.raises(aiproxy.SettingError) as caught:
        aiproxy.Settings({name: file(b"81")})

    assert str(caught.value) == "%s is not a setting; did you mean %s?" % (name, meant)


def test_check_shows_the_path_and_help_the_names(file):
    path = file(KEY + b"\n")
    shown = aiproxy.Settings({"AIPROXY_KEY_FILE": path}).shown

    assert shown["AIPROXY_KEY_FILE"] == path
    assert shown["AIPROXY_KEY"] == "13 characters"
    assert KEY.decode() not in str(shown)

    text = aiproxy.make_parser().format_help()
    assert "NAME_FILE" in text
    assert all(name in text.partition("NAME_FILE")[2] for name in OPTIONS)


def test_an_env_file_may_name_the_file(file):
    env_file = file(b"AIPROXY_KEY_FILE=%s\n" % file(KEY).encode(), "env")
    environ = {}
    aiproxy.read_env_files([env_file], environ)

    assert aiproxy.Settings(environ).provider_keys == [KEY]
