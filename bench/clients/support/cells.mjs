// Runs the cases of one client and prints a line of JSON for each: cells.py for Node.

export const URL_ = process.env.BATON_URL;
export const BASE_URL = `${URL_}/v1`;
export const MODEL = process.env.BATON_MODEL;
export const KEY = "none";
const CASE_MS = 60_000;

// What the bench's model knows (bench/clients/model.py).
export const QUESTION = "Facts: Ada likes plums. Question: what does Ada like?";
export const IN_JSON = "Facts: Ada likes plums. Question: what does Ada like, as JSON?";
export const ANSWER = "Ada likes plums.";
export const FACT = { name: "Ada", thing: "plums" };
// It has to call the tool to know.
export const CALLING = "What does Ada like?";
export const TOOL = "facts";
export const TOOL_ABOUT = "What a person likes.";
export const PARAMETERS = {
  type: "object",
  properties: { person: { type: "string", enum: ["Ada", "Carl"] } },
  required: ["person"],
  additionalProperties: false,
};
export const SCHEMA = {
  type: "object",
  properties: {
    name: { type: "string", enum: ["Ada", "Carl"] },
    thing: { type: "string", enum: ["plums", "jam"] },
  },
  required: ["name", "thing"],
  additionalProperties: false,
};
export const TOOL_OF_OPENAI = {
  type: "function",
  function: { name: TOOL, description: TOOL_ABOUT, parameters: PARAMETERS },
};

const cases = [];

// What the tool answers.
export const factsOf = (person) => `${person} likes plums.`;

// A case of a feature; it has passed if it throws nothing.
export const check = (feature, name, run) => cases.push({ feature, name, run });
export const lacks = (feature, why) => cases.push({ feature, name: "", why });

const shown = (value) => JSON.stringify(value) ?? "undefined";

export function equal(found, expected, what = "the answer") {
  if (shown(found) !== shown(expected)) throw new Error(`${what} is ${shown(found)}, expected ${shown(expected)}`);
}

export const answers = (text) => equal((text ?? "").trim(), ANSWER);

export function told(found, what) {
  if (!found) throw new Error(`${what} is ${shown(found)}, expected something`);
}

// More than one piece, and the whole when joined.
export function streamed(pieces, expected = ANSWER) {
  equal(pieces.join("").trim(), expected, "the joined stream");
  if (pieces.filter(Boolean).length < 2) throw new Error(`the stream had the pieces ${shown(pieces)}`);
}

export async function collected(iterable, part = (piece) => piece) {
  const pieces = [];
  for await (const piece of iterable) pieces.push(part(piece));
  return pieces;
}

const say = (feature, name, state, said) => console.log(JSON.stringify({ feature, case: name, state, said }));

function late(ms) {
  let timer;
  const ended = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`it took more than ${ms / 1000} s`)), ms);
  });
  return { ended, stop: () => clearTimeout(timer) };
}

export async function main() {
  const only = process.argv.slice(2);
  for (const { feature, name, run, why } of cases) {
    if (only.length && !only.includes(feature)) continue;
    if (why !== undefined) {
      say(feature, name, "not offered", why);
      continue;
    }
    const limit = late(CASE_MS);
    try {
      await Promise.race([run(), limit.ended]);
      say(feature, name, "ok", "");
    } catch (error) {
      console.error(error);
      say(feature, name, "failed", `${error?.name}: ${error?.message}`.slice(0, 600));
    } finally {
      limit.stop();
    }
  }
  // A case that was given up may hold a connection.
  process.exit(0);
}
