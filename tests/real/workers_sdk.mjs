// The official openai package for Node with the relay in front of a fake Cloudflare
// (../fake_cloudflare.py runs both). It is given a base URL and a client key and nothing else.
// `node workers_sdk.mjs openai-newest` takes another of package.json's versions;
// PYTHON names the interpreter, python3 if it is not set.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const { default: OpenAI } = await import(process.argv[2] ?? "openai");
const HELLO = [{ role: "user", content: "Hello?" }];
const LLAMA = "@cf/meta/llama-3.1-8b-instruct";
const GPT = "@cf/openai/gpt-oss-20b";
const WEATHER = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } } },
    },
  },
];

const fake = spawn(
  process.env.PYTHON ?? "python3",
  [fileURLToPath(new URL("../fake_cloudflare.py", import.meta.url))],
  { stdio: ["pipe", "pipe", "inherit"] }
);
const url = (await createInterface({ input: fake.stdout })[Symbol.asyncIterator]().next()).value;
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "ck-alice", maxRetries: 0 });

let passed = 0;
let failed = 0;
async function check(name, body) {
  try {
    await body();
    passed++;
    console.log("passed", name);
  } catch (error) {
    failed++;
    console.log("FAILED", name, error);
  }
}

async function collect(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

const textOf = (events) =>
  events
    .flatMap((event) => event.choices)
    .map((one) => one.delta?.content ?? one.text ?? "")
    .join("");

// What `call` throws must be of this class, with this code and status.
async function throws(kind, code, status, call) {
  await assert.rejects(call, (error) => {
    assert.equal(error.constructor.name, kind.name);
    assert.deepEqual([error.code, error.status], [code, status]);
    assert.ok(error.message && !error.message.includes("AiError"));
    return true;
  });
}

await check("chat", async () => {
  const answer = await client.chat.completions.create({ model: "llama-4-scout", messages: HELLO });
  assert.ok(answer.choices[0].message.content.startsWith("I am Llama 4 Scout"));
  assert.deepEqual(
    [answer.model, answer.object, answer.usage.total_tokens, answer.choices[0].finish_reason],
    ["llama-4-scout", "chat.completion", 25, "stop"]
  );
  assert.ok(answer._request_id);
});
for (const [model, text] of [
  [LLAMA, "Hello!"],
  ["llama-4-scout", "Hello!"],
  ["@cf/shape/kimi", "Hello!"],
  ["@cf/shape/dual", "Hello!"],
  ["@cf/shape/number", "78"],
  ["@cf/shape/bare", "4"],
]) {
  await check("stream: " + model, async () => {
    const events = await collect(
      client.chat.completions.create({ model, messages: HELLO, stream: true })
    );
    assert.equal(textOf(events), text);
    assert.equal(events[0].choices[0].delta.role, "assistant");
    assert.deepEqual(events.map((event) => event.choices[0].finish_reason).filter(Boolean), [
      "stop",
    ]);
    assert.ok(!events.some((event) => event.usage));
  });
}
await check("usage at the end of a stream", async () => {
  const last = (
    await collect(
      client.chat.completions.create({
        model: LLAMA,
        messages: HELLO,
        stream: true,
        stream_options: { include_usage: true },
      })
    )
  ).at(-1);
  assert.deepEqual(last.choices, []);
  assert.deepEqual([last.usage.prompt_tokens, last.usage.completion_tokens], [45, 2]);
});
for (const model of ["@cf/shape/flat-tool", GPT]) {
  await check("tools: " + model, async () => {
    const [choice] = (
      await client.chat.completions.create({ model, messages: HELLO, tools: WEATHER })
    ).choices;
    const [call] = choice.message.tool_calls;
    assert.deepEqual(
      [choice.finish_reason, choice.message.content, call.type, call.function.name],
      ["tool_calls", null, "function", "get_weather"]
    );
    assert.ok(call.id && JSON.parse(call.function.arguments));
  });
}
for (const model of [GPT, "@cf/shape/sentinel", "@cf/shape/flat-tool"]) {
  await check("tools in a stream: " + model, async () => {
    const [choice] = (
      await client.chat.completions
        .stream({ model, messages: HELLO, tools: WEATHER })
        .finalChatCompletion()
    ).choices;
    assert.deepEqual(
      [
        choice.finish_reason,
        choice.message.tool_calls.length,
        choice.message.tool_calls[0].function.name,
      ],
      ["tool_calls", 1, "get_weather"]
    );
    assert.equal(typeof JSON.parse(choice.message.tool_calls[0].function.arguments), "object");
  });
}
await check("completion", async () => {
  const answer = await client.completions.create({ model: LLAMA, prompt: "Once" });
  assert.deepEqual(
    [answer.object, answer.choices[0].text, answer.usage.total_tokens],
    ["text_completion", "4", 33]
  );
});
await check("completion, stream", async () =>
  assert.equal(
    textOf(
      await collect(client.completions.create({ model: LLAMA, prompt: "Once", stream: true }))
    ),
    "Hello!"
  )
);
for (const model of ["@cf/baai/bge-m3", "@cf/legacy/bge", "@cf/base64/bge"]) {
  await check("embeddings, which this SDK asks for as base64: " + model, async () => {
    const answer = await client.embeddings.create({ model, input: ["Once", "é"] });
    assert.deepEqual(
      answer.data.map((one) => Array.from(one.embedding)),
      [
        [4, -0.5],
        [1, -0.5],
      ]
    );
  });
}
await check("embeddings, as floats", async () => {
  assert.deepEqual(
    (
      await client.embeddings.create({
        model: "@cf/baai/bge-m3",
        input: "Once",
        encoding_format: "float",
      })
    ).data[0].embedding,
    [4, -0.5]
  );
});
if (client.responses) {
  await check("response", async () => {
    const answer = await client.responses.create({ model: LLAMA, input: "Once" });
    assert.deepEqual([answer.output_text, answer.model, answer.status], ["4", LLAMA, "completed"]);
  });
  await check("response, stream", async () => {
    const events = await collect(
      client.responses.create({ model: LLAMA, input: "Once", stream: true })
    );
    assert.deepEqual(
      [events[0].type, events[4].type, events.at(-1).type],
      ["response.created", "response.output_text.delta", "response.completed"]
    );
    assert.equal(events.at(-1).response.model, LLAMA);
  });
  for (const model of [GPT, "@cf/shape/flat-tool", "@cf/shape/sentinel"]) {
    await check("response, two turns with a tool: " + model, async () => {
      const tools = [{ type: "function", strict: false, ...WEATHER[0].function }];
      const stream = client.responses.stream({ model, input: "Once", tools });
      const deltas = [];
      stream.on("response.function_call_arguments.delta", (event) => deltas.push(event.delta));
      const first = await stream.finalResponse();
      const [call] = first.output.filter((item) => item.type === "function_call");
      assert.equal(call.name, "get_weather");
      assert.equal(deltas.join(""), call.arguments);
      const input = [
        { role: "user", content: "Once" },
        ...first.output,
        { type: "function_call_output", call_id: call.call_id, output: "sunny" },
      ];
      const second = await client.responses.create({ model, input, tools });
      assert.equal(second.output_text, "It is sunny.");
    });
  }
  await check("response, stored: a 400", () =>
    throws(OpenAI.BadRequestError, "invalid_parameter", 400, () =>
      client.responses.create({ model: LLAMA, input: "Once", previous_response_id: "resp_1" })
    )
  );
}
await check("models", async () => {
  const ids = (await collect(client.models.list())).map((model) => model.id);
  assert.ok(
    ids[0] === "gpt-oss-20b" && ids.includes("@cf/baai/bge-m3") && !ids.includes("@cf/old/gone")
  );
});
await check("a model with slashes", async () => {
  const model = await client.models.retrieve(GPT);
  assert.deepEqual([model.id, model.created, model.owned_by], [GPT, 1754390993, "cloudflare"]);
});
await check("errors before the answer", async () => {
  for (const [model, kind, code, status] of [
    ["@cf/error/400/5007", OpenAI.NotFoundError, "model_not_found", 404],
    ["@cf/error/400/5006", OpenAI.BadRequestError, "invalid_request", 400],
    ["@cf/error/403/5035", OpenAI.PermissionDeniedError, "permission_denied", 403],
    ["@cf/error/429/3040", OpenAI.RateLimitError, "rate_limit_exceeded", 429],
    ["@cf/error/429/4006", OpenAI.RateLimitError, "insufficient_quota", 429],
    ["@cf/error/401/10000", OpenAI.InternalServerError, "upstream_credentials_rejected", 502],
    ["@cf/error/500/8005", OpenAI.InternalServerError, "upstream_error", 502],
    ["@cf/broken/html", OpenAI.InternalServerError, "upstream_bad_response", 502],
  ]) {
    for (const stream of [false, true])
      await throws(kind, code, status, () =>
        client.chat.completions.create({ model, messages: HELLO, stream })
      );
  }
});
await check("errors of our own", async () => {
  await throws(OpenAI.BadRequestError, "invalid_model", 400, () =>
    client.chat.completions.create({ model: "", messages: HELLO })
  );
  await throws(OpenAI.NotFoundError, "model_not_found", 404, () =>
    client.models.retrieve("@cf/no/such")
  );
  await throws(OpenAI.AuthenticationError, "invalid_api_key", 401, () =>
    client.withOptions({ apiKey: "wrong" }).models.list()
  );
});
for (const [form, code] of [
  ["envelope", "invalid_request"],
  ["object", "invalid_prompt"],
  ["vllm", "invalid_request"],
]) {
  await check("an error in mid-stream: " + form, async () => {
    const model = "@cf/mid/" + form;
    await throws(OpenAI.APIError, code, undefined, () =>
      collect(client.chat.completions.create({ model, messages: HELLO, stream: true }))
    );
    await throws(OpenAI.APIError, code, undefined, () =>
      collect(client.completions.create({ model, prompt: "Once", stream: true }))
    );
    await throws(OpenAI.APIError, code, undefined, () =>
      collect(client.responses.create({ model, input: "Once", stream: true }))
    );
  });
}
await check("a cut stream is an error", async () => {
  await assert.rejects(
    () =>
      collect(
        client.chat.completions.create({ model: "@cf/mid/cut", messages: HELLO, stream: true })
      ),
    (error) => ["upstream_died", "upstream_bad_response"].includes(error.code)
  );
});

fake.stdin.end();
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed || !passed ? 1 : 0;
