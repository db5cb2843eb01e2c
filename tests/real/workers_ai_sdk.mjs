// The AI SDK (npm: ai, @ai-sdk/openai, @ai-sdk/openai-compatible) with the relay in front of a fake
// Cloudflare: tools in two turns, whole and streamed, by Responses (its default) and by chat.
// AI_SDK names a folder whose node_modules has the packages, if not this one; PYTHON names the
// interpreter, python3 if it is not set.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { fileURLToPath, pathToFileURL } from "node:url";

const from = createRequire(process.env.AI_SDK ? process.env.AI_SDK + "/x.js" : import.meta.url);
const load = (name) => import(pathToFileURL(from.resolve(name)));
const { generateText, streamText, tool, stepCountIs } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const fake = spawn(
  process.env.PYTHON ?? "python3",
  [fileURLToPath(new URL("../fake_cloudflare.py", import.meta.url))],
  { stdio: ["pipe", "pipe", "inherit"] }
);
const url = (await createInterface({ input: fake.stdout })[Symbol.asyncIterator]().next()).value;
const told = { baseURL: url + "/v1", apiKey: "ck-alice" };
const openai = createOpenAI(told);
const compatible = createOpenAICompatible({ name: "relay", ...told });
const tools = {
  get_weather: tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string().optional(), location: z.string().optional() }),
    execute: async () => "sunny",
  }),
};

let passed = 0;
let failed = 0;
// The last one writes a forced call into its text.
const forced = { type: "tool", toolName: "get_weather" };
const models = ["@cf/openai/gpt-oss-20b", "@cf/shape/flat-tool", "@cf/shape/sentinel"];
for (const name of [...models, "@cf/openai/gpt-oss-120b"]) {
  for (const [kind, model] of [
    ["responses", openai.responses(name)],
    ["chat", openai.chat(name)],
    ["compatible", compatible(name)],
  ]) {
    for (const isStream of [false, true]) {
      const title = [kind, name, isStream ? "stream" : "whole"].join(" ");
      try {
        const asked = {
          model,
          tools,
          messages: [{ role: "user", content: [{ type: "text", text: "Weather?" }] }],
          prepareStep: ({ stepNumber }) =>
            stepNumber === 0 && name.includes("120b") ? { toolChoice: forced } : {},
          stopWhen: stepCountIs(3),
          maxRetries: 0,
          onError: ({ error }) => console.log(error),
        };
        const result = isStream ? streamText(asked) : await generateText(asked);
        const steps = await result.steps;
        assert.equal(await result.text, "It is sunny.");
        assert.deepEqual(
          steps.map((step) => [step.finishReason, step.toolCalls.length]),
          [
            ["tool-calls", 1],
            ["stop", 0],
          ]
        );
        passed++;
        console.log("passed", title);
      } catch (error) {
        failed++;
        console.log("FAILED", title, error);
      }
    }
  }
}
fake.stdin.end();
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed || !passed ? 1 : 0;
