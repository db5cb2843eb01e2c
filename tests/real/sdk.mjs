// The official `openai` package for Node through a relay with a provider key configured: the first
// version of today's kind, the newest for Node 20, and the newest.
import assert from "node:assert/strict"
import { HELLO, HIDDEN, TEXT, check, end, version } from "./stand.mjs"
import { gatedEvents, serve, startMock, startRelay } from "./stand.mjs"

const mock = await startMock()
const relay = await startRelay({ ...HIDDEN, UPSTREAM: mock })
const TOOL = {
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: {} } },
}
console.log("Node " + process.versions.node)

for (const name of ["openai-oldest", "openai", "openai-newest"]) {
  const { default: OpenAI } = await import(name)
  const client = (base = relay.url, options) =>
    new OpenAI({ baseURL: base + "/v1", apiKey: "ck-app", maxRetries: 0, ...options })
  const chat = (from, options) =>
    from.chat.completions.create({ model: "gpt-4o", messages: HELLO, ...options })
  console.log(`openai ${version(name)}`)
  await check("chat", async () =>
    assert.equal((await chat(client())).choices[0].message.content, TEXT)
  )
  await check("20 at once", async () => {
    const one = client()
    for (const answer of await Promise.all(Array.from({ length: 20 }, () => chat(one))))
      assert.equal(answer.choices[0].message.content, TEXT)
  })
  await check("stream", async () => {
    const pieces = []
    for await (const part of await chat(client(), { stream: true }))
      pieces.push(part.choices[0]?.delta.content ?? "")
    assert.equal(pieces.join(""), TEXT)
    assert(pieces.length > 5)
  })
  await check("tools", async () => {
    const { function: called } = (
      await chat(client(), {
        messages: [{ role: "user", content: "weather in Tokyo?" }],
        tools: [TOOL],
      })
    ).choices[0].message.tool_calls[0]
    assert.deepEqual(
      [called.name, JSON.parse(called.arguments)],
      ["get_weather", { city: "Tokyo" }]
    )
  })
  await check("embeddings", async () => {
    // As floats: the mock does not serve base64.
    const answer = await client().embeddings.create({
      model: "text-embedding-3-small",
      input: "hello",
      encoding_format: "float",
    })
    assert.deepEqual(Array.from(answer.data[0].embedding), [0.25, -0.5, 1])
  })
  await check("models", async () => {
    const ids = []
    for await (const model of client().models.list()) ids.push(model.id)
    assert.deepEqual(ids, HIDDEN.MODELS.split(","))
  })
  await check("raw headers: a request id, and not the key", async () => {
    const { response } = await chat(client()).withResponse()
    assert(response.headers.get("x-request-id"))
    assert(!JSON.stringify([...response.headers]).includes("sk-hidden-key"))
  })
  for (const [what, status, code, call] of [
    [
      "a wrong key",
      401,
      "invalid_api_key",
      () => client(relay.url, { apiKey: "ck-wrong" }).models.list(),
    ],
    ["another model", 403, "model_not_allowed", () => chat(client(), { model: "o1" })],
  ]) {
    await check(`${what}: ${status} ${code}`, () =>
      assert.rejects(
        async () => call(),
        error => error.status === status && error.code === code
      )
    )
  }
  await check("each event before the next, and an abort that the upstream sees", async () => {
    const gate = gatedEvents(["a", "b", "c", "never"])
    const own = await startRelay({ ...HIDDEN, UPSTREAM: await serve(gate.answer) })
    const read = []
    const stream = await chat(client(own.url), { stream: true })
    for await (const part of stream) {
      read.push(part.choices[0].delta.content)
      // Leaving the loop makes the SDK abort the request.
      if (read.length === 3) break
      gate.open()
    }
    const left = Date.now()
    assert((await gate.closed) - left < 15000)
    assert.deepEqual(read, ["a", "b", "c"])
  })
  await check("429 with Retry-After is retried, and not too early", async () => {
    const seen = []
    const busy = await serve((request, response) => {
      seen.push(Date.now())
      response.writeHead(seen.length === 1 ? 429 : 200, {
        "Content-Type": "application/json",
        "Retry-After": "1",
      })
      response.end(
        JSON.stringify(
          seen.length === 1
            ? { error: { message: "Slow down." } }
            : { choices: [{ message: { content: "at last" } }] }
        )
      )
    })
    const own = await startRelay({ ...HIDDEN, UPSTREAM: busy })
    assert.equal(
      (await chat(client(own.url, { maxRetries: 2 }))).choices[0].message.content,
      "at last"
    )
    assert(seen.length === 2 && seen[1] - seen[0] >= 900, seen)
  })
}
await check("no fault was printed", async () =>
  assert(!/Traceback|fault/.test(relay.said), relay.said)
)
end()
