// A real browser (Debian's chromium). A page from another origin calls the relay with the official
// `openai` package; then the start page is used.
import assert from "node:assert/strict"
import { execFileSync } from "node:child_process"
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
    assert((await gate.closed) - left < 1500)
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

async function onStartPage(url, what) {
  const context = await browser.newContext({ permissions: ["clipboard-read"] })
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
    await page.waitForFunction(() =>
      /arrives\.$/.test(document.querySelector("#answer").textContent)
    )
    await idle(page)
    assert((await page.evaluate(() => steps.size)) > 10)
    assert.match(await page.textContent("#figures"), /^first event after \d+ ms, \d+\.\d tokens\/s/)
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
      await page.waitForFunction(() =>
        /arrives\.$/.test(document.querySelector("#answer").textContent)
      )
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
for (const [width, height] of [
  [390, 844],
  [1280, 800],
]) {
  await check(`start page: nothing sticks out at ${width} pixels`, () =>
    onStartPage(demo.url, async page => {
      await page.setViewportSize({ width, height })
      await page.locator("#models button").waitFor()
      assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), width)
    })
  )
}
await check("start page: no complaint in the console", async () => assert.deepEqual(complaints, []))
await check("no fault was printed", async () => {
  for (const { said } of [relay, gated, demo, guarded]) assert(!/Traceback|fault/.test(said), said)
})
await browser.close()
end()
