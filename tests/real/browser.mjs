// A real browser (Debian's chromium). A page from another origin calls the relay with the official
// `openai` package; then the start page is used.
import assert from "node:assert/strict"
import { execFileSync } from "node:child_process"
import { once } from "node:events"
import { connect } from "node:net"
import { createServer as createTlsServer } from "node:tls"
import { fileURLToPath } from "node:url"
import { build } from "esbuild"
import { chromium } from "playwright-core"
import { HELLO, HIDDEN, TEXT, check, end, version } from "./stand.mjs"
import { gatedEvents, serve, startMock, startRelay } from "./stand.mjs"

// The other page's server: an empty page, and the package bundled as people's builds do it.
const bundle = await build({
  stdin: {
    contents: 'export { default } from "openai-newest"',
    resolveDir: fileURLToPath(new URL(".", import.meta.url)),
  },
  bundle: true,
  format: "esm",
  platform: "browser",
  write: false,
})
const pageServer = (request, response) => {
  const script = request.url === "/openai.mjs"
  response.writeHead(200, { "Content-Type": script ? "text/javascript" : "text/html" })
  response.end(script ? bundle.outputFiles[0].contents : "<!doctype html>")
}
const [home, foreign] = [await serve(pageServer), await serve(pageServer)]
const gate = gatedEvents(["a", "b", "c", "never"])
const mock = await startMock()
const relay = await startRelay({ ...HIDDEN, UPSTREAM: mock, ORIGINS: home })
const gated = await startRelay({
  ...HIDDEN,
  UPSTREAM: await serve(gate.answer),
  ORIGINS: home,
  RATE: "1/min",
})
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
})
console.log(
  `Chromium ${browser.version()}, openai ${version("openai-newest")}, ` +
    `playwright-core ${version("playwright-core")}, esbuild ${version("esbuild")}`
)

// Runs `what(client, parameters)` in a page of `origin`, which can call `noteRead`.
async function inPage(
  origin,
  what,
  parameters,
  { url = relay.url, key = "ck-app", noteRead = () => {} } = {}
) {
  const page = await browser.newPage()
  await page.goto(origin)
  await page.exposeFunction("noteRead", noteRead)
  try {
    return await page.evaluate(
      async ({ what, parameters, url, key }) => {
        const { default: OpenAI } = await import("/openai.mjs")
        const client = new OpenAI({
          baseURL: url + "/v1",
          apiKey: key,
          maxRetries: 0,
          dangerouslyAllowBrowser: true,
        })
        try {
          return await (0, eval)(what)(client, parameters)
        } catch (error) {
          return {
            failed: error.constructor.name,
            status: error.status,
            code: error.code,
            message: error.message,
            id: error.headers?.get("x-request-id"),
            after: error.headers?.get("retry-after"),
            left: error.headers?.get("x-ratelimit-remaining-requests"),
          }
        }
      },
      { what: what.toString(), parameters, url, key }
    )
  } finally {
    await page.close()
  }
}
const ask = (client, request) => client.chat.completions.create(request)
const CHAT = { model: "gpt-4o", messages: HELLO }

await check("chat", async () =>
  assert.equal((await inPage(home, ask, CHAT)).choices[0].message.content, TEXT)
)
await check("stream", async () => {
  const pieces = await inPage(
    home,
    async (client, request) => {
      const pieces = []
      for await (const part of await client.chat.completions.create({ ...request, stream: true }))
        pieces.push(part.choices[0]?.delta.content ?? "")
      return pieces
    },
    CHAT
  )
  assert.equal(pieces.join(""), TEXT)
  assert(pieces.length > 5)
})
await check(
  "request id and rate limits can be read, each event before the next, " +
    "and the upstream sees an abort",
  async () => {
    const {
      read,
      id,
      left: remaining,
    } = await inPage(
      home,
      async (client, request) => {
        const read = []
        const controller = new AbortController()
        const {
          data,
          response: { headers },
        } = await client.chat.completions
          .create({ ...request, stream: true }, { signal: controller.signal })
          .withResponse()
        try {
          for await (const part of data) {
            read.push(part.choices[0].delta.content)
            if (read.length === 3) controller.abort()
            else await noteRead()
          }
        } catch (error) {
          if (error.name !== "AbortError" && error.constructor.name !== "APIUserAbortError")
            throw error
        }
        return {
          read: read.join(""),
          id: headers.get("x-request-id"),
          left: headers.get("x-ratelimit-remaining-requests"),
        }
      },
      CHAT,
      { url: gated.url, noteRead: () => gate.open() }
    )
    const left = Date.now()
    assert.deepEqual([read, remaining, Boolean(id)], ["abc", "41", true])
    assert((await gate.closed) - left < 15000)
  }
)
await check("AIPROXY_RATE: 429, its code and fields", async () => {
  const error = await inPage(home, ask, CHAT, { url: gated.url })
  assert.deepEqual(
    [error.failed, error.status, error.code, error.left],
    ["RateLimitError", 429, "rate_limit_exceeded", "0"]
  )
  assert(Number(error.after) > 0 && error.id, JSON.stringify(error))
})
await check("a wrong key: 401 and its code", async () => {
  const error = await inPage(home, ask, CHAT, { key: "ck-wrong" })
  assert.deepEqual(
    [error.failed, error.status, error.code],
    ["AuthenticationError", 401, "invalid_api_key"]
  )
})
await check("another model: 403 and its code", async () => {
  const error = await inPage(home, ask, { ...CHAT, model: "o1" })
  assert.deepEqual(
    [error.failed, error.status, error.code],
    ["PermissionDeniedError", 403, "model_not_allowed"]
  )
})
await check("a forbidden origin: the browser refuses, the upstream hears nothing", async () => {
  const before = gate.requests
  assert.equal((await inPage(foreign, ask, CHAT)).failed, "APIConnectionError")
  assert.equal((await inPage(foreign, ask, CHAT, { url: gated.url })).failed, "APIConnectionError")
  assert.equal(gate.requests, before)
})

// The start page, on the demo provider.
const demo = await startRelay({}, "--demo")
const guarded = await startRelay({ CLIENT_KEYS: "app=ck-app" }, "--demo")
const complaints = []

async function onStartPage(url, what, locale = "en-US") {
  const context = await browser.newContext({
    locale,
    permissions: ["clipboard-read"],
    ignoreHTTPSErrors: true,
  })
  const page = await context.newPage()
  page.on("console", message => {
    if (/Content.Security.Policy|Uncaught/i.test(message.text())) complaints.push(message.text())
  })
  page.on("pageerror", error => complaints.push(String(error)))
  page.setDefaultTimeout(10000)
  try {
    const reply = await page.goto(url)
    assert.match(reply.headers()["content-type"], /^text\/html/)
    return await what(page, reply)
  } finally {
    await context.close()
  }
}
const idle = page => page.waitForFunction(() => !document.querySelector("#send").disabled)
const arrived = page =>
  page.waitForFunction(() => /arrives\.$/.test(document.querySelector("#answer").textContent))

await check("start page: strict about what it may load, and a nonce for each time", () =>
  onStartPage(demo.url, async (page, reply) => {
    const policies = [
      reply.headers()["content-security-policy"],
      (await page.reload()).headers()["content-security-policy"],
    ]
    assert.match(policies[0], /default-src 'none'/)
    assert.match(policies[0], /connect-src 'self'/)
    assert.doesNotMatch(policies[0], /unsafe/)
    assert.notEqual(...policies)
  })
)
await check("start page: JSON for who does not ask for HTML", async () =>
  assert.equal((await (await fetch(demo.url)).json()).name, "aiproxy")
)
await check("start page: a prompt streams in, with its figures", () =>
  onStartPage(demo.url, async page => {
    await page.locator("#models button", { hasText: "demo" }).click()
    await page.evaluate(() => {
      window.steps = new Set()
      new MutationObserver(() => steps.add(document.querySelector("#answer").textContent)).observe(
        document.querySelector("#answer"),
        { childList: true, characterData: true, subtree: true }
      )
    })
    await page.click("#send")
    await arrived(page)
    await idle(page)
    assert((await page.evaluate(() => steps.size)) > 10)
    assert.match(await page.textContent("#figures"), /^first event after \d+ ms, ~\d+\.\d tokens/)
  })
)
await check("start page: an answer that breaks off keeps what came, and says so", async () => {
  const half = await serve((request, response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" })
    response.write('data: {"choices": [{"delta": {"content": "half an"}}]}\n\n')
    setTimeout(() => request.socket.destroy(), 200)
  })
  await onStartPage(
    (await startRelay({ KEY: "sk-hidden-key", UPSTREAM: half, MODELS: "m" })).url,
    async page => {
      await page.locator("#models button").waitFor()
      await page.click("#send")
      await idle(page)
      assert.equal(await page.textContent("#answer"), "half an")
      const error = await page.textContent("#error")
      assert.match(error, /^upstream_died\nThe upstream closed the connection/)
    }
  )
})
await check("start page: no model is put into the box in which somebody types", async () => {
  let [list, posted] = [() => {}, ""]
  const slow = await serve((request, response) => {
    request.on("data", data => (posted += data))
    if (request.method === "POST") return response.end("{}")
    list = () => response.end('{"data": [{"id": "Qwen/Qwen3-8B"}]}')
  })
  await onStartPage((await startRelay({ UPSTREAM: slow })).url, async page => {
    const arrives = page.locator("#models button", { hasText: "Qwen" }).waitFor()
    await page.focus("#model")
    await page.waitForTimeout(200)
    list()
    await arrives
    assert.match(await page.textContent("#curl"), /"Qwen\/Qwen3-8B"/)
    await page.keyboard.type("Qwen/Qwen3-8B")
    assert.equal(await page.inputValue("#model"), "Qwen/Qwen3-8B")
    await page.fill("#model", "")
    await page.click("#send")
    await idle(page)
    assert.equal(JSON.parse(posted).model, "Qwen/Qwen3-8B")
  })
})
await check("start page: stop", () =>
  onStartPage(demo.url, async page => {
    await page.locator("#models button").waitFor()
    await page.click("#send")
    await page.waitForFunction(() => document.querySelector("#answer").textContent)
    await page.click("#stop")
    await idle(page)
    assert.match(await page.textContent("#figures"), /stopped/)
    assert.doesNotMatch(await page.textContent("#answer"), /arrives/)
  })
)
await check(
  "start page: a wrong key is shown as it is, the right one works and stays in the page",
  () =>
    onStartPage(guarded.url, async page => {
      await page.fill("#key", "ck-wrong")
      await page.fill("#model", "demo")
      await page.click("#send")
      await page.locator("#error:not(:empty)").waitFor()
      assert.equal(
        await page.textContent("#error"),
        "HTTP 401 invalid_api_key\nIncorrect client key."
      )
      await page.fill("#key", "ck-app")
      await page.press("#key", "Tab")
      await page.locator("#models button", { hasText: "demo" }).waitFor()
      await page.click("#send")
      await arrived(page)
      assert.deepEqual(
        await page.evaluate(() => [
          localStorage.length,
          sessionStorage.length,
          document.cookie,
          location.href.includes("ck-app"),
          document.body.innerText.includes("ck-app"),
        ]),
        [0, 0, "", false, false]
      )
    })
)
await check("start page: the snippets are copied, and curl's and the browser's run", () =>
  onStartPage(guarded.url, async page => {
    await page.fill("#key", "ck-app")
    await page.press("#key", "Tab")
    await page.locator("#models button", { hasText: "demo" }).waitFor()
    for (const id of ["base", "curl", "python", "script"]) {
      await page.click(`[data-of=${id}]`)
      assert.equal(
        await page.evaluate(() => navigator.clipboard.readText()),
        await page.textContent("#" + id)
      )
    }
    const [curl, script] = [await page.textContent("#curl"), await page.textContent("#script")].map(
      text => text.replace("YOUR_KEY", "ck-app")
    )
    assert.match(
      execFileSync("sh", ["-c", curl.replace("curl", "curl -sS -m 20")], { encoding: "utf8" }),
      /data: \[DONE\]\s*$/
    )
    // The browser's snippet runs in a page of another origin.
    const other = await browser.newPage()
    await other.goto(home)
    const said = await other.evaluate(async script => {
      const said = []
      await new (async () => {}).constructor("console", script)({ log: text => said.push(text) })
      return said
    }, script)
    await other.close()
    assert.match(said.join(""), /data: \[DONE\]\s*$/)
  })
)

// In two languages. `visible` are all words of the page but those of the snippets, which have none.
const visible = page =>
  page.evaluate(() => {
    for (const code of document.querySelectorAll("pre, code")) code.remove()
    return document.body.innerText
  })
const ENGLISH = {
  locale: "en-US",
  lang: "en",
  title: "aiproxy: an AI endpoint",
  words: /Models[^]+Try it[^]+Your key[^]+Prompt[^]+Send[^]+Stop[^]+Use it/,
  foreign: /[\u3000-\u9fff\uff00-\uffef]/,
  prompt: /^Say hello/,
  copy: ["Copy", "Copied"],
  figures: /^first event after \d+ ms, ~\d+\.\d tokens\/s$/,
}
const CHINESE = {
  locale: "zh-CN",
  lang: "zh-CN",
  title: "aiproxy：AI 接口",
  words: /模型[^]+试一试[^]+你的 API Key[^]+提示词[^]+发送[^]+停止[^]+调用示例/,
  foreign: /\b(?!aiproxy|OpenAI|AI|API|Key|Base|URL|Shift|Enter|curl|Python|JavaScript)[a-z]{2}/i,
  prompt: /^用一句话/,
  copy: ["复制", "已复制"],
  figures: /^首个事件耗时 \d+ ms，~\d+\.\d tokens\/s$/,
}
const front = createTlsServer(selfSigned(), client => {
  const upstream = connect(new URL(guarded.url).port, "127.0.0.1")
  client.pipe(upstream).pipe(client)
  for (const socket of [client, upstream]) socket.on("error", () => upstream.destroy())
})
front.listen(0, "127.0.0.1")
await once(front, "listening")
const secure = `https://localhost:${front.address().port}`

function selfSigned() {
  const command =
    "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout - -out - 2>&1"
  const pem = execFileSync("sh", ["-c", command], { encoding: "utf8" })
  return { key: pem, cert: pem }
}
for (const { locale, lang, title, words, foreign, prompt, copy, figures } of [ENGLISH, CHINESE]) {
  await check(`start page, ${locale}: its words, from the first byte, and no others`, () =>
    onStartPage(
      guarded.url,
      async (page, reply) => {
        assert.match(await reply.text(), new RegExp(`lang="${lang}"><title>${title}<`))
        await page.locator("#curl:not(:empty)").waitFor()
        assert.equal(await page.evaluate(() => document.documentElement.lang), lang)
        assert.equal(await page.title(), title)
        assert.match(await page.inputValue("#prompt"), prompt)
        const text = await visible(page)
        assert.match(text, words)
        assert.doesNotMatch(text, foreign)
      },
      locale
    )
  )
  for (const url of [guarded.url, secure]) {
    const scheme = new URL(url).protocol
    await check(`start page, ${locale}, ${scheme} by the keyboard: key, prompt, copy`, () =>
      onStartPage(
        url,
        async page => {
          await page.locator("#curl:not(:empty)").waitFor()
          await page.getByLabel("Key").fill("ck-app")
          await page.press("#key", "Tab")
          await page.locator("#models button").waitFor()
          await page.fill("#prompt", "")
          await page.focus("#prompt")
          await page.keyboard.type("a")
          await page.keyboard.press("Shift+Enter")
          await page.keyboard.type("b")
          const composing = { key: "Enter", keyCode: 229, isComposing: true }
          await page.dispatchEvent("#prompt", "keydown", composing)
          assert.equal(await page.inputValue("#prompt"), "a\nb")
          assert.equal(await page.textContent("#figures"), "")
          await page.keyboard.press("Enter")
          await arrived(page)
          await idle(page)
          assert.match(await page.textContent("#figures"), figures)
          assert.equal(await page.inputValue("#prompt"), "a\nb")

          const button = page.locator("[data-of=curl]")
          assert.equal(await button.textContent(), copy[0])
          await button.press("Enter")
          assert.equal(await button.textContent(), copy[1])
          const copied = await page.evaluate(() => navigator.clipboard.readText())
          assert(copied.startsWith(`curl -N ${url}/v1/chat/completions`), copied)
          await page.getByText(copy[1]).waitFor({ state: "detached" })
          assert.equal(await page.textContent("#base"), url + "/v1")
        },
        locale
      )
    )
  }
  for (const [width, height] of [
    [390, 844],
    [1280, 800],
  ]) {
    await check(`start page, ${locale}: nothing sticks out at ${width} pixels`, () =>
      onStartPage(
        demo.url,
        async page => {
          await page.setViewportSize({ width, height })
          await page.locator("#models button").waitFor()
          assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), width)
        },
        locale
      )
    )
  }
}
for (const colorScheme of ["light", "dark"]) {
  await check(`start page, ${colorScheme}: each text has a contrast of 4.5 at least`, () =>
    onStartPage(guarded.url, async page => {
      await page.emulateMedia({ colorScheme })
      await page.fill("#model", "demo")
      await page.click("#send")
      await page.locator("#error:not(:empty)").waitFor()
      const poor = await page.evaluate(lowContrasts)
      assert.deepEqual(poor, [])
    })
  )
}
function lowContrasts() {
  const numbers = color => color.match(/[\d.]+/g).map(Number)
  function luminance(color) {
    const linear = numbers(color)
      .slice(0, 3)
      .map(value => value / 255)
      .map(value => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  }
  function background(element) {
    const color = getComputedStyle(element).backgroundColor
    return numbers(color)[3] === 0 ? background(element.parentElement) : color
  }
  const poor = []
  for (const element of document.querySelectorAll("main *:not(:disabled)")) {
    const [a, b] = [getComputedStyle(element).color, background(element)].map(luminance)
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    if (contrast < 4.5) poor.push([element.outerHTML, contrast])
  }
  return poor
}
await check("start page: no complaint in the console", async () => assert.deepEqual(complaints, []))
await check("no fault was printed", async () => {
  for (const { said } of [relay, gated, demo, guarded]) assert(!/Traceback|fault/.test(said), said)
})
await browser.close()
end()
