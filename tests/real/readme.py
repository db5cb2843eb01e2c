"""The README's samples, run unchanged against the demo.

They are in curl, in Python with `openai`, and in JavaScript: a page's fetch, run in Node.
"""

import os
import re
import subprocess
import sys
import tempfile

from stand import TESTS, Checks, Program, check_calm
from support import EVENT_HEAD, Upstream, chunk, event

README = open(os.path.join(os.path.dirname(TESTS), "README.md"), encoding="utf-8").read()
WORDS = "This answer comes from the small provider"


def samples(language, *words):
    found = [
        text
        for text in re.findall(r"```%s\n(.*?)```" % language, README, re.S)
        if all(word in text for word in words)
    ]
    assert found, (language, words)
    return found


def run(command, text, folder, **environ):
    path = os.path.join(folder, "sample" + {"node": ".mjs", "bash": ".sh"}.get(command, ".py"))
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    done = subprocess.run(
        [command, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environ},
        timeout=60,
        universal_newlines=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# In the place of the sample one, which does not start.
CLIENT_KEY = "ck-0123456789"


def check_failures(checks, page, folder):
    """What the page shows of an answer that is refused, or is cut."""
    def die(received):
        received.send(EVENT_HEAD + chunk(event('{"choices":[{"delta":{"content":"Half"}}]}'))
                      + chunk(event('{"choices":[],"usage":{}}')))
        received.reset()

    env = {"AIPROXY_KEY": "sk-0123456789", "AIPROXY_CLIENT_KEYS": "app=" + CLIENT_KEY}
    with Upstream() as upstream, Program("--upstream", upstream.url, env=env) as relay:
        page = page.replace("https://relay.example", relay.url)
        with checks("JavaScript sample: an answer that was cut says so"):
            upstream.answer = die
            said = run("node", page, folder)
            assert said.startswith("Half [") and "upstream" in said.lower(), said
        with checks("JavaScript sample: a refusal says so"):
            said = run("node", page.replace(CLIENT_KEY, "ck-wrong"), folder)
            assert "401" in said and "Incorrect client key." in said, said


def main():
    checks = Checks()
    guarded = Program("--demo", env={
        "AIPROXY_CLIENT_KEYS": "app=" + CLIENT_KEY, "AIPROXY_LOG": "json"})
    with Program("--demo") as demo, guarded, tempfile.TemporaryDirectory() as folder:
        # As they stand in the first minute of each half: on this machine, without a client key.
        clients = re.findall(r"`(OpenAI\(base_url=.*?)`", README)
        assert len(clients) == 2
        for number, text in enumerate(clients):
            with checks("Python sample %d" % number):
                text = text.replace("http://127.0.0.1:8000", demo.url)
                ask = (
                    "from openai import OpenAI"
                    "\nclient = %s"
                    '\nmessages = [{"role": "user", "content": "Hello!"}]'
                    '\nanswer = client.chat.completions.create(model="demo", messages=messages)'
                    "\nprint(answer.choices[0].message.content)\n" % text
                )
                assert WORDS in run(sys.executable, ask, folder)
        curls = samples("sh", "curl -N")
        assert len(curls) == 2
        for number, text in enumerate(curls):
            with checks("curl sample %d" % number):
                text = text.replace("http://127.0.0.1:8000", demo.url)
                assert "data: [DONE]" in run("bash", text, folder)
        asks = samples("sh", "\"gpt-oss-20b\", \"messages\"")
        assert len(asks) == 2
        for number, text in enumerate(asks):
            with checks("curl sample of the free quota %d" % number):
                text = text.replace("http://127.0.0.1:8000", guarded.url)
                text = text.replace("a-long-random-string", CLIENT_KEY)
                assert WORDS in run("bash", text, folder)
        page, = samples("js", "fetch(")
        page = page.replace("document.body.append(", "process.stdout.write(")
        page = page.replace("a-long-random-string", CLIENT_KEY)
        with checks("JavaScript sample"):
            assert WORDS in run("node", page.replace("https://relay.example", guarded.url), folder)
        check_failures(checks, page, folder)
        with checks("the sums of the log"):
            command, = set(re.findall(r"journalctl -u aiproxy -o cat \| (awk .*?)`", README))
            lines = guarded.lines + ["a line of something else"]
            path = os.path.join(folder, "log")
            with open(path, "w", encoding="utf-8") as file:
                file.write("\n".join(line.rstrip("\n") for line in lines) + "\n")
            said = run("bash", "cat %s | %s" % (path, command), folder)
            assert re.fullmatch(r"app [1-9][0-9]*\n", said), said
        with checks("no fault was printed"):
            check_calm(demo)
            check_calm(guarded)
    checks.end()


if __name__ == "__main__":
    main()
