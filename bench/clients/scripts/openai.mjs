// The openai package for Node.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  ANSWER, BASE_URL, CALLING, FACT, IN_JSON, KEY, MODEL, QUESTION, SCHEMA, TOOL, TOOL_OF_OPENAI, answers, check,
  collected, equal, factsOf, lacks, main, streamed, told,
} from "../support/cells.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const Fact = z.object({ name: z.enum(["Ada", "Carl"]), thing: z.enum(["plums", "jam"]) });
const user = (content) => [{ role: "user", content }];
const chat = (text, more = {}) => client.chat.completions.create({ model: MODEL, messages: user(text), ...more });

check("plain", "chat completions", async () => {
  const found = await chat(QUESTION);
  answers(found.choices[0].message.content);
  equal(found.choices[0].finish_reason, "stop");
});
check("plain", "completions", async () => {
  const found = await client.completions.create({
    model: MODEL, prompt: `${QUESTION} Answer:`, temperature: 0, max_tokens: 20,
  });
  answers(found.choices[0].text);
});
check("plain", "models", async () => equal(await collected(client.models.list(), (model) => model.id), [MODEL]));

check("stream", "chat chunks", async () => {
  const chunks = await collected(await chat(QUESTION, { stream: true, stream_options: { include_usage: true } }));
  streamed(chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? "")));
  told(chunks.at(-1).usage, "usage of the last chunk");
});
check("stream", "chat helper", async () => {
  const stream = client.chat.completions.stream({ model: MODEL, messages: user(QUESTION) });
  const pieces = [];
  stream.on("content", (delta) => pieces.push(delta));
  answers((await stream.finalChatCompletion()).choices[0].message.content);
  streamed(pieces);
});

function oneCall(choice) {
  const calls = choice.message.tool_calls;
  equal(calls?.length, 1, "the number of calls");
  equal([calls[0].function.name, JSON.parse(calls[0].function.arguments)], [TOOL, { person: "Ada" }]);
  return calls[0];
}
check("tools", "required", async () => {
  oneCall((await chat(CALLING, { tools: [TOOL_OF_OPENAI], tool_choice: "required" })).choices[0]);
});
check("tools", "named", async () => {
  const choice = { type: "function", function: { name: TOOL } };
  oneCall((await chat(CALLING, { tools: [TOOL_OF_OPENAI], tool_choice: choice })).choices[0]);
});
check("tools", "streamed call", async () => {
  const stream = client.chat.completions.stream({
    model: MODEL, messages: user(CALLING), tools: [TOOL_OF_OPENAI], tool_choice: "required",
  });
  oneCall((await stream.finalChatCompletion()).choices[0]);
});

const runnable = (asked) => ({
  type: "function",
  function: {
    ...TOOL_OF_OPENAI.function,
    parse: JSON.parse,
    function: ({ person }) => {
      asked.push(person);
      return factsOf(person);
    },
  },
});
for (const stream of [false, true]) {
  check("agent", `runTools, ${stream ? "streamed" : "whole"}`, async () => {
    const asked = [];
    const runner = client.chat.completions.runTools({
      model: MODEL, messages: user(CALLING), tools: [runnable(asked)], stream,
    });
    answers(await runner.finalContent());
    equal(asked, ["Ada"], "the calls");
  });
}
check("agent", "responses loop", async () => {
  const tools = [{ type: "function", ...TOOL_OF_OPENAI.function, strict: true }];
  const first = await client.responses.create({ model: MODEL, input: CALLING, tools });
  const call = first.output.find((item) => item.type === "function_call");
  equal([call?.name, call?.arguments && JSON.parse(call.arguments)], [TOOL, { person: "Ada" }]);
  const input = [{ type: "function_call_output", call_id: call.call_id, output: factsOf("Ada") }];
  const last = await client.responses.create({ model: MODEL, input, tools, previous_response_id: first.id });
  answers(last.output_text);
});

check("structured", "json_schema", async () => {
  const form = { type: "json_schema", json_schema: { name: "fact", schema: SCHEMA, strict: true } };
  equal(JSON.parse((await chat(IN_JSON, { response_format: form })).choices[0].message.content), FACT);
});
check("structured", "parse with zod", async () => {
  const found = await client.chat.completions.parse({
    model: MODEL, messages: user(IN_JSON), response_format: zodResponseFormat(Fact, "fact"),
  });
  equal(found.choices[0].message.parsed, FACT);
});
check("structured", "a tool of zod", async () => {
  const found = await client.chat.completions.parse({
    model: MODEL, messages: user(QUESTION), tools: [zodFunction({ name: "fact", parameters: Fact })],
    tool_choice: "required",
  });
  equal(found.choices[0].message.tool_calls[0].function.parsed_arguments, FACT);
});
check("structured", "responses parse", async () => {
  const found = await client.responses.parse({
    model: MODEL, input: IN_JSON, text: { format: zodTextFormat(Fact, "fact") },
  });
  equal(found.output_parsed, FACT);
});

check("reasoning", "effort", async () => {
  const found = await chat(QUESTION, { reasoning_effort: "low" });
  answers(found.choices[0].message.content);
  answers(found.choices[0].message.reasoning_content);
  told(found.usage.completion_tokens_details.reasoning_tokens, "reasoning_tokens");
});
check("reasoning", "responses effort", async () => {
  const found = await client.responses.create({ model: MODEL, input: QUESTION, reasoning: { effort: "low" } });
  answers(found.output.find((item) => item.type === "reasoning")?.content[0].text);
  answers(found.output_text);
});

check("logprobs", "of chat", async () => {
  const found = (await chat(QUESTION, { logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
  equal(found.map((entry) => entry.token).join("").trim(), ANSWER);
});

check("responses", "response", async () => {
  answers((await client.responses.create({ model: MODEL, input: QUESTION })).output_text);
});
check("responses", "response events", async () => {
  const pieces = [];
  const stream = client.responses.stream({ model: MODEL, input: QUESTION });
  stream.on("response.output_text.delta", (event) => pieces.push(event.delta));
  answers((await stream.finalResponse()).output_text);
  streamed(pieces);
});
lacks("messages", "the package has OpenAI's API alone");

check("embeddings", "base64", async () => {
  const found = await client.embeddings.create({ model: MODEL, input: [QUESTION, CALLING] });
  equal(found.data.length, 2);
  told(found.data[0].embedding.length, "numbers");
});

await main();
