// Polls /status/data once a second while the page is visible, and draws it. The data contains untrusted text, so it
// becomes text nodes and attributes only, never markup.
"use strict";

const POLL_MS = 1000;
const TIMEOUT_MS = 5000;
const LEDGER = ["prompt", "sending", "leased", "running", "quarantined", "cached"];
// A symbol beside the colour, for readers who cannot tell colours apart.
const STATES = {
  ready: ["good", "● ready"], connecting: ["warn", "◌ connecting"], suspect: ["warn", "▲ suspect"],
  draining: ["warn", "◐ draining"], left: ["warn", "○ left"], lost: ["bad", "✕ dead"], refused: ["bad", "✕ refused"],
};
// How each stage of a lifeline is drawn.
const STAGES = {
  tokenize: "tokenize", rerun: "rerun", placement: "queue", reserve: "queue", prefill_queue: "queue", prefill: "prefill",
  network: "network", transfer: "transfer", decode: "decode", "no token": "rerun",
};
const OUTCOMES = { finished: "good", rejected: "warn", cancelled: "warn", failed: "bad" };
const SERIES = [
  { title: "Time to first token", lines: { p50: "ttft_p50_s", p95: "ttft_p95_s" }, show: seconds },
  { title: "Time between tokens", lines: { p50: "tbt_p50_s", p95: "tbt_p95_s" }, show: seconds },
  { title: "Tokens a second", lines: { rate: "tokens_per_s" }, show: count },
  { title: "Requests a second", lines: { rate: "requests_per_s" }, show: count },
  { title: "Cached prompt tokens", lines: { rate: "cached_share" }, show: percent },
];

const $ = (id) => document.getElementById(id);
let key = sessionStorage.getItem("baton-key") || "";
let last = null;
let timer = 0;
let isAsking = false;

// ── Number formats ──────────────────────────────────────────────────────────────────────────────────────────────────

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${three(value * 1e3)} ms`;
  if (value < 120) return `${three(value)} s`;
  return value < 7200 ? `${(value / 60).toFixed(0)} min` : `${(value / 3600).toFixed(1)} h`;
}

function three(value) {
  return value >= 99.95 ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

function count(value) {
  if (value >= 1e6) return `${three(value / 1e6)} M`;
  if (value >= 1e4) return `${three(value / 1e3)} k`;
  return Number.isInteger(value) ? String(value) : three(value);
}

function percent(value) {
  return `${(100 * value).toFixed(0)} %`;
}

// The router's wall clock in the reader's time zone.
function clock(at_s, withSeconds) {
  const parts = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  return new Date(at_s * 1000).toLocaleTimeString([], withSeconds ? { ...parts, second: "2-digit" } : parts);
}

function bytes(value) {
  return value < 1 << 20 ? `${(value / 1024).toFixed(0)} KiB` : `${(value / (1 << 20)).toFixed(1)} MiB`;
}

// ── Elements ────────────────────────────────────────────────────────────────────────────────────────────────────────

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((x) => x !== ""));
  return made;
}

function name(text) {
  const made = element("span", "name", text);
  made.title = text;
  return made;
}

function cell(className, ...children) {
  const made = element("td", className, ...children);
  made.setAttribute("role", "cell");
  return made;
}

function heading(...children) {
  const made = element("th", "", ...children);
  made.scope = "row";
  made.setAttribute("role", "rowheader");
  return made;
}

// Unchanged rows are not redrawn: of 200 nodes few change in a second.
function rows(body, items, keyOf, draw) {
  const labels = [...body.parentElement.tHead.rows[0].cells].map((x) => x.textContent);
  const old = new Map([...body.children].map((row) => [row.dataset.key, row]));
  let at = body.firstElementChild;
  for (const item of items) {
    const rowKey = keyOf(item);
    const content = JSON.stringify(item);
    let row = old.get(rowKey);
    old.delete(rowKey);
    if (!row) {
      row = element("tr");
      row.setAttribute("role", "row");
      row.dataset.key = rowKey;
    }
    if (row.said !== content) {
      row.said = content;
      row.replaceChildren(...draw(item));
      // For narrow screens, where a row is a card without the column's head above it.
      [...row.cells].forEach((x, i) => { x.dataset.label = labels[i]; });
    }
    if (row === at) at = at.nextElementSibling;
    else body.insertBefore(row, at);
  }
  for (const row of old.values()) row.remove();
}

function kvBar(blocks) {
  const parts = LEDGER.filter((state) => blocks[state]).map((state) => `${blocks[state]} ${state}`);
  const bar = element("div", "bar");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", [...parts, `${blocks.free} free of ${blocks.total} blocks`].join(", "));
  bar.title = bar.getAttribute("aria-label");
  for (const state of LEDGER) {
    if (!blocks[state]) continue;
    const part = element("i", `kv-${state}`);
    part.style.width = `${(100 * blocks[state]) / blocks.total}%`;
    bar.append(part);
  }
  // Cached blocks are given to sequences that need them.
  const share = blocks.total ? (100 * (blocks.total - blocks.free - blocks.cached)) / blocks.total : 0;
  const text = share > 0 && share < 1 ? "<1" : share.toFixed(0);
  return element("div", "kv", bar, element("span", "", `${text} % of ${count(blocks.total)}`));
}

function relayNames(request) {
  if (!request.prefill) return cell("relay-names soft", "–");
  const why = ["whole", "borrowed", "prefix"].includes(request.placement) ? ` (${request.placement})` : "";
  if (request.prefill === request.decode) return cell("relay-names", name(request.prefill), why);
  return cell("relay-names", name(request.prefill), " → ", name(request.decode));
}

const requestName = (request) => (request.choice ? `${request.id}/${request.choice}` : request.id);

// ── Parts of the page ───────────────────────────────────────────────────────────────────────────────────────────────

function drawHead(data) {
  const router = data.router;
  $("model").textContent = router.model;
  $("router").textContent = `${router.id}, version ${router.version}, up ${seconds(router.up_s)}`;
  $("as-of").textContent = `as of ${clock(data.at_s, true)}, your local time`;
  document.title = `${router.num_active ? `(${router.num_active}) ` : ""}Baton ${router.model}`;
  $("connection").replaceChildren(element("span", ...readiness(data)));
}

function readiness(data) {
  if (!data.router.is_ready) return ["bad", "✕ not ready: no node takes work"];
  const unwell = data.nodes.filter((node) => node.state !== "ready").length;
  return unwell ? ["warn", `▲ ready, ${unwell} of ${data.num_nodes} nodes are not`] : ["good", "● ready"];
}

function drawRelay(stages) {
  for (const item of $("relay").children) item.firstElementChild.textContent = count(stages[item.dataset.stage]);
}

function drawPools(pools) {
  rows($("pools"), pools, (pool) => pool.role, (pool) => [
    heading(pool.role),
    cell(pool.num_ready < pool.num_nodes ? "warn" : "",
      `${pool.num_ready} of ${pool.num_nodes}${pool.num_borrowed ? `, ${pool.num_borrowed} borrowed` : ""}`),
    cell("number", count(pool.num_waiting)),
    cell("number", count(pool.queued_prompt_tokens)),
    cell("number", count(pool.num_running)),
    cell("number", count(pool.running_tokens)),
    cell("bar-cell", kvBar(pool.blocks)),
  ]);
}

function drawNodes(data) {
  const filter = $("node-filter").value;
  const shown = data.nodes.filter((node) =>
    !filter || (filter === "unwell" ? node.state !== "ready" : node.home === filter));
  const unwell = data.nodes.filter((node) => node.state !== "ready").length;
  const hidden = data.num_nodes - shown.length;
  $("node-count").textContent = `${data.num_nodes}${unwell ? `, ${unwell} not ready` : ""}${hidden ? `, ${hidden} not shown` : ""}`;
  $("node-controls").hidden = data.num_nodes <= 8;
  rows($("nodes"), shown.map(steady), (node) => node.address, nodeCells);
}

// Without fields that change with every poll and are not drawn.
function steady(node) {
  const { silent_s, stalled_s, queued_prompt_tokens, running_tokens, ...rest } = node;
  if (node.state !== "ready" && silent_s > 0.5) rest.note = `nothing heard for ${seconds(silent_s)}`;
  if (stalled_s > 1) rest.note = `no engine step for ${seconds(stalled_s)}`;
  return rest;
}

function nodeCells(node) {
  const [className, text] = STATES[node.state] || ["", node.state];
  const state = cell("", element("span", className, text));
  const reason = node.note || node.reason;
  if (reason) state.append(element("span", "reason", reason));
  const first = heading(name(node.id || node.address));
  first.title = [node.address, node.device].filter(Boolean).join(", ");
  const home = node.is_pinned ? `${node.home}, set by hand` : node.home || "–";
  const role = node.role && node.role !== node.home ? `${home}, acts as ${node.role}` : home;
  if (!node.blocks) return [first, cell("", role), state, cell("number", "–"), cell("number", "–"), cell("bar-cell soft", "–")];
  return [first, cell("", role), state, cell("number", count(node.num_waiting)), cell("number", count(node.num_running)),
    cell("bar-cell", kvBar(node.blocks))];
}

function drawRecent(recent) {
  const isCommon = $("scale").value === "all";
  const longest_s = Math.max(...recent.map((x) => x.e2e_s), 1e-6);
  $("no-recent").hidden = recent.length > 0;
  const scaled = recent.map((x) => ({ ...x, scale_s: isCommon ? longest_s : x.e2e_s || 1e-6 }));
  rows($("recent"), scaled, (x) => `${x.id}/${x.choice}`, recentCells);
}

function recentCells(request) {
  const outcome = element("span", OUTCOMES[request.outcome] || "", request.outcome === "finished" ? request.detail : request.outcome);
  const cells = [heading(name(requestName(request))), cell("", outcome)];
  if (request.outcome !== "finished" && request.detail) cells[1].append(` ${request.detail}`);
  if (request.attempts > 1) cells[1].append(element("span", "soft", ` ${request.attempts} attempts`));
  const hasToken = request.num_tokens > 0;
  return [...cells, relayNames(request),
    cell("number", ...tokens(request)),
    objectiveCell(request, "ttft", hasToken ? seconds(request.ttft_s) : "–"),
    objectiveCell(request, "tbt", request.num_tokens > 1 ? seconds(request.tbt_s) : "–"),
    cell("number", seconds(request.e2e_s)),
    cell("bar-cell", lifeline(request, hasToken))];
}

function objectiveCell(request, objective, text) {
  const isMissed = request.missed.includes(objective);
  const made = cell(isMissed ? "number warn" : "number", isMissed ? `▲ ${text}` : text);
  if (isMissed) made.title = "beyond the request's objective";
  return made;
}

function tokens(request) {
  const sum = `${count(request.num_prompt_tokens)} + ${count(request.num_tokens)}`;
  return request.num_cached_tokens ? [element("span", "soft", `${count(request.num_cached_tokens)} cached, `), sum] : [sum];
}

function lifeline(request, hasToken) {
  const parts = request.stages.map(([stage, , length_s]) => `${stage.replace("_", " ")} ${seconds(length_s)}`);
  const moved = request.transfer;
  if (moved) {
    const how = moved.is_layerwise ? "layer by layer" : "at once";
    parts.push(`${bytes(moved.num_bytes)} over ${moved.transport} ${how} in ${seconds(moved.total_s)}`);
  }
  const bar = element("div", "life");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", parts.join(", ") || "no stage was reached");
  bar.title = parts.join("\n");
  const at = (value_s) => `${Math.min(100, (100 * value_s) / request.scale_s)}%`;
  for (const [stage, start_s, length_s] of request.stages) {
    const part = element("i", `stage-${STAGES[stage] || "queue"}`);
    part.style.left = at(start_s);
    part.style.width = at(length_s);
    bar.append(part);
  }
  if (hasToken) {
    const mark = element("i", "first-token");
    mark.style.left = at(request.ttft_s);
    bar.append(mark);
  }
  return bar;
}

function drawFlight(data) {
  const flight = data.in_flight;
  const all = data.router.num_active;
  $("no-flight").hidden = flight.length > 0;
  $("flight-count").textContent = all > flight.length ? `the oldest ${flight.length} of ${count(all)}` : count(all);
  rows($("flight"), flight, (x) => `${x.id}/${x.choice}`, (x) => [
    heading(name(requestName(x))),
    cell("", element("i", `swatch stage-${x.stage}`), x.stage),
    relayNames(x),
    cell("number", count(x.num_prompt_tokens)),
    cell("number", `${count(x.num_tokens)} of ${count(x.max_tokens)}`),
    cell("number", seconds(x.age_s)),
    cell(x.attempts > 1 ? "number warn" : "number", String(x.attempts)),
  ]);
}

function drawSeries(series, at_s) {
  const total_s = series.slice_s * series.tokens_per_s.length;
  $("span").textContent = `${(total_s / 60).toFixed(0)} minutes`;
  $("series").replaceChildren(...SERIES.map((spec) => sparkline(spec, series, [at_s - total_s, at_s])));
}

function sparkline(spec, series, [from_s, until_s]) {
  const svg = $("sparkline").content.firstElementChild.cloneNode(true);
  const blank = svg.firstElementChild;
  const lines = Object.entries(spec.lines).map(([kind, from]) => [kind, series[from]]);
  const highest = Math.max(...lines.flatMap(([, values]) => values.map((x) => x || 0)));
  const top = highest || 1;
  const width = lines[0][1].length;
  svg.setAttribute("viewBox", `0 0 ${width} 100`);
  const said = [];
  const legend = element("span", "key");
  for (const [kind, values] of lines) {
    const path = blank.cloneNode();
    path.setAttribute("class", kind);
    path.setAttribute("d", outline(values, top));
    svg.append(path);
    const latest = values.filter((x) => x !== null).pop();
    const text = `${kind === "rate" ? "" : `${kind} `}${latest === undefined ? "–" : spec.show(latest)}`;
    legend.append(element("i", kind, text), " ");
    said.push(text);
  }
  blank.remove();
  svg.setAttribute("aria-label", `${spec.title}, latest: ${said.join(", ")}; from 0 to ${spec.show(highest)}`);
  const times = element("span", "times", element("span", "", clock(from_s)), element("span", "", clock(until_s)));
  const plot = element("div", "plot", element("span", "high", highest ? spec.show(highest) : ""), svg,
    element("span", "low", "0"), times);
  return element("figure", "", element("figcaption", "", element("span", "", spec.title), legend), plot);
}

// A line with gaps where nothing was measured; a lone value is a short dash.
function outline(values, top) {
  let path = "";
  let isDown = false;
  values.forEach((value, i) => {
    if (value === null) {
      isDown = false;
      return;
    }
    const y = (97 - (94 * value) / top).toFixed(1);
    path += isDown ? `L${i + 0.5} ${y}` : `M${i} ${y}L${i + 0.5} ${y}`;
    isDown = true;
  });
  return path;
}

function draw(data) {
  drawHead(data);
  drawRelay(data.relay);
  drawSeries(data.series, data.at_s);
  drawPools(data.pools);
  drawNodes(data);
  drawRecent(data.recent);
  drawFlight(data);
  document.querySelector("main").hidden = false;
  $("key-form").hidden = true;
}

// ── Polling ─────────────────────────────────────────────────────────────────────────────────────────────────────────

async function ask() {
  if (isAsking || document.hidden) return;
  isAsking = true;
  clearTimeout(timer);
  try {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const answer = await fetch("status/data", { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (answer.status === 401 || answer.status === 403) {
      wantKey();
      return;
    }
    if (!answer.ok) throw new Error(`the router answered ${answer.status}`);
    last = await answer.json();
    draw(last);
  } catch (error) {
    $("connection").replaceChildren(element("span", "bad", `✕ ${last ? "this is old: " : ""}no answer (${error.message})`));
  } finally {
    isAsking = false;
  }
  timer = setTimeout(ask, POLL_MS);
}

function wantKey() {
  if (key) $("key-error").textContent = "That is not its admin key.";
  key = "";
  sessionStorage.removeItem("baton-key");
  $("connection").textContent = "locked";
  $("key-form").hidden = false;
  document.querySelector("main").hidden = true;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  $("key-error").textContent = "";
  sessionStorage.setItem("baton-key", key);
  ask();
});
for (const id of ["node-filter", "scale"]) $(id).addEventListener("change", () => last && draw(last));
document.addEventListener("visibilitychange", ask);
ask();
