// A provider that we did not write: npm's @copilotkit/aimock.
// It prints its URL and ends when its standard input ends.
import { LLMock } from "@copilotkit/aimock";

const mock = new LLMock({ port: 0, chunkSize: 5 });
mock.onMessage(/weather/, { toolCalls: [{ name: "get_weather", arguments: '{"city":"Tokyo"}' }] });
mock.onEmbedding(/.*/, { embedding: [0.25, -0.5, 1] });
mock.onMessage(/.*/, { content: "Hello from the mock: 你好, caf\u00e9, in several pieces." });
await mock.start();
console.log(mock.url);
process.stdin.resume().on("end", () => process.exit(0));
