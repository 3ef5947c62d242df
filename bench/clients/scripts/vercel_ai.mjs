// Vercel's AI SDK, with its providers for OpenAI (both APIs), for servers like it, and for Anthropic.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { z } from "zod";
import {
  ANSWER, BASE_URL, CALLING, FACT, IN_JSON, KEY, MODEL, QUESTION, TOOL, TOOL_ABOUT, answers, check, collected, equal,
  factsOf, main, streamed, told,
} from "../support/cells.mjs";

const compatible = createOpenAICompatible({
  name: "baton", baseURL: BASE_URL, apiKey: KEY, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: BASE_URL, apiKey: KEY });
const anthropic = createAnthropic({ baseURL: BASE_URL, apiKey: KEY });
const chat = compatible(MODEL);
const responses = openai.responses(MODEL);
const messages = anthropic(MODEL);
const stepCount = ai.isStepCount ?? ai.stepCountIs;

const Fact = z.object({ name: z.enum(["Ada", "Carl"]), thing: z.enum(["plums", "jam"]) });
// Without a limit of its own the client asks Anthropic's API for more than this model's context.
const settings = { maxRetries: 0, maxOutputTokens: 200 };
const ask = (model, prompt, more = {}) => ai.generateText({ model, prompt, ...settings, ...more });

check("plain", "compatible", async () => answers((await ask(chat, QUESTION)).text));
check("plain", "openai chat", async () => answers((await ask(openai.chat(MODEL), QUESTION)).text));
check("plain", "completion", async () => {
  const found = await ask(compatible.completionModel(MODEL), QUESTION, { temperature: 0, stopSequences: ["\n"] });
  answers(found.text);
});

const streams = async (model) => {
  const found = ai.streamText({ model, prompt: QUESTION, ...settings });
  streamed(await collected(found.textStream));
};
check("stream", "compatible", () => streams(chat));
check("stream", "openai chat", () => streams(openai.chat(MODEL)));

const tools = (asked) => ({
  [TOOL]: ai.tool({
    description: TOOL_ABOUT,
    inputSchema: z.object({ person: z.enum(["Ada", "Carl"]) }),
    execute: async ({ person }) => {
      asked.push(person);
      return factsOf(person);
    },
  }),
});
const calls = async (model, toolChoice) => {
  const found = await ask(model, CALLING, { tools: tools([]), toolChoice });
  equal(found.toolCalls.map((call) => [call.toolName, call.input]), [[TOOL, { person: "Ada" }]], "the calls");
  equal(found.finishReason, "tool-calls");
};
check("tools", "required", () => calls(chat, "required"));
check("tools", "named", () => calls(chat, { type: "tool", toolName: TOOL }));
check("tools", "required by responses", () => calls(responses, "required"));
check("tools", "required by messages", () => calls(messages, "required"));

const loops = async (model) => {
  const asked = [];
  const found = await ask(model, CALLING, { tools: tools(asked), stopWhen: stepCount(4) });
  equal(asked, ["Ada"], "the calls");
  equal(found.steps.length, 2, "the number of steps");
  answers(found.text);
};
check("agent", "loop", () => loops(chat));
check("agent", "loop by responses", () => loops(responses));
check("agent", "loop by messages", () => loops(messages));
check("agent", "streamed loop", async () => {
  const asked = [];
  const found = ai.streamText({
    model: chat, prompt: CALLING, tools: tools(asked), stopWhen: stepCount(4), ...settings,
  });
  streamed(await collected(found.textStream));
  equal(asked, ["Ada"], "the calls");
});

const structured = async (model) => {
  const found = await ask(model, IN_JSON, { output: ai.Output.object({ schema: Fact }) });
  equal(found.output, FACT);
};
check("structured", "compatible", () => structured(chat));
check("structured", "openai chat", () => structured(openai.chat(MODEL)));
check("structured", "responses", () => structured(responses));
check("structured", "messages", () => structured(messages));

check("reasoning", "compatible", async () => {
  const found = await ask(chat, QUESTION, { providerOptions: { baton: { reasoningEffort: "low" } } });
  answers(found.text);
  answers(found.reasoningText);
});
check("reasoning", "messages", async () => {
  const thinking = { type: "enabled", budgetTokens: 1024 };
  const found = await ask(messages, QUESTION, { providerOptions: { anthropic: { thinking } } });
  answers(found.text);
  answers(found.reasoningText);
});

check("logprobs", "openai chat", async () => {
  const found = await ask(openai.chat(MODEL), QUESTION, { providerOptions: { openai: { logprobs: 2 } } });
  equal(found.providerMetadata.openai.logprobs.map((entry) => entry.token).join("").trim(), ANSWER);
});

check("responses", "response", async () => answers((await ask(responses, QUESTION)).text));
check("responses", "response stream", () => streams(responses));
check("messages", "message", async () => answers((await ask(messages, QUESTION)).text));
check("messages", "message stream", () => streams(messages));

check("embeddings", "compatible", async () => {
  const model = (compatible.embeddingModel ?? compatible.textEmbeddingModel)(MODEL);
  told((await ai.embed({ model, value: QUESTION, maxRetries: 0 })).embedding.length, "numbers");
});

await main();
