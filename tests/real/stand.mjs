// What the .mjs scripts in this folder have in common: counted checks, the program, and a provider.
import { spawn } from "node:child_process"
import { once } from "node:events"
import { createServer } from "node:http"
import { readFileSync } from "node:fs"
import { createInterface } from "node:readline"
import { fileURLToPath } from "node:url"

const here = name => fileURLToPath(new URL(name, import.meta.url))
const children = []
let passed = 0
let failed = 0

export async function check(name, what) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(reject, 30000, new Error("not done after 30 s"))
  })
  try {
    await Promise.race([what(), late])
    passed++
    console.log("passed " + name)
  } catch (error) {
    failed++
    console.log("FAILED " + name + "\n" + error.stack)
  }
  clearTimeout(timer)
}

export function end() {
  for (const child of children) child.kill()
  console.log(`${passed} passed, ${failed} failed`)
  process.exit(failed || !passed ? 1 : 0)
}

async function firstMatch(stream, pattern) {
  for await (const line of createInterface({ input: stream }))
    if (pattern.test(line)) return line.match(pattern)[1]
  throw new Error("it ended without a line like " + pattern)
}

// Starts aiproxy.py as a process of its own; its settings are named without AIPROXY_.
// Returns its `url`, and in `said` what it has written to stderr so far.
export async function startRelay(settings, ...options) {
  const env = Object.fromEntries(
    Object.entries(process.env).filter(
      ([name]) => !/^(AIPROXY_|CLOUDFLARE_|PORT$|https?_proxy$|no_proxy$)/i.test(name)
    )
  )
  for (const [name, value] of Object.entries({ PORT: 0, ...settings }))
    env["AIPROXY_" + name] = String(value)
  const child = spawn(process.env.PYTHON ?? "python3", [here("../../aiproxy.py"), ...options], {
    env,
    stdio: ["ignore", "ignore", "pipe"],
  })
  children.push(child)
  const relay = { said: "" }
  child.stderr.on("data", data => {
    relay.said += data
  })
  relay.url = await firstMatch(child.stderr, /^aiproxy \S+ on (http:\S+)$/)
  return relay
}

// The provider that we did not write: see mock.mjs.
export async function startMock() {
  const child = spawn(process.execPath, [here("mock.mjs")], { stdio: ["pipe", "pipe", "inherit"] })
  children.push(child)
  return firstMatch(child.stdout, /(http:\S+)/)
}

// A server of our own: `answer(request, response)`.
export async function serve(answer) {
  const server = createServer(answer)
  server.listen(0, "127.0.0.1")
  await once(server, "listening")
  return `http://127.0.0.1:${server.address().port}`
}

// A streamed response: each event waits until `gate.open()` is called for the one before.
// `gate.closed` resolves when the client has left.
export function gatedEvents(texts) {
  const gate = { requests: 0, open: () => {} }
  gate.closed = new Promise(resolve => {
    gate.noteClosed = resolve
  })
  gate.answer = async (request, response) => {
    gate.requests++
    request.resume()
    response.on("close", () => {
      if (!response.writableFinished) gate.noteClosed(Date.now())
    })
    response.writeHead(200, {
      "Content-Type": "text/event-stream",
      "x-ratelimit-remaining-requests": "41",
    })
    for (const content of texts) {
      const read = new Promise(resolve => {
        gate.open = resolve
      })
      response.write(
        "data: " +
          JSON.stringify({
            id: "c1",
            object: "chat.completion.chunk",
            created: 0,
            model: "gpt-4o",
            choices: [{ index: 0, delta: { content }, finish_reason: null }],
          }) +
          "\n\n"
      )
      await read
    }
    response.end("data: [DONE]\n\n")
  }
  return gate
}

export const version = name =>
  JSON.parse(readFileSync(here(`node_modules/${name}/package.json`))).version
export const HELLO = [{ role: "user", content: "hello" }]
export const TEXT = "Hello from the mock: 你好, caf\u00e9, in several pieces."
export const HIDDEN = {
  KEY: "sk-hidden-key",
  CLIENT_KEYS: "app=ck-app",
  MODELS: "gpt-4o,text-embedding-3-small",
}
