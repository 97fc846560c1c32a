// The page of the server: it asks the OpenAI API beside it, and shows what comes. Texts of models are always text, never HTML.
"use strict";

const $ = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const { cls, text, ...rest } = options;
  const node = Object.assign(document.createElement(tag), rest);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

// --------------------------------------------------------------------------------------------------------------------
// what is kept in the tab

const SLIDERS = [ // name in the API, label, low, high, step
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_k", "Top-k (0: all)", 0, 200, 1],
  ["top_p", "Top-p", 0.01, 1, 0.01],
  ["min_p", "Min-p", 0, 0.5, 0.01],
  ["repetition_penalty", "Repetition penalty", 0.8, 2, 0.05],
  ["max_tokens", "Max tokens", 1, 1000, 1],
];
const ALTERNATIVES = 5; // of each token

const state = {
  models: [], // of /v1/models
  defaults: {},
  picked: ["", ""], // names; the second one is "" without a comparison
  mode: "chat",
  settings: {},
  system: "",
  seed: "",
  stops: "",
  colours: true,
  turns: [],
};
const KEPT = ["picked", "mode", "settings", "system", "seed", "stops", "colours", "turns"];
let running = null; // the AbortController of what is being drawn

function save() {
  const kept = Object.fromEntries(KEPT.map((name) => [name, state[name]]));
  try {
    sessionStorage.setItem("page", JSON.stringify(kept));
  } catch { // too long: without the probabilities
    const turns = state.turns.map((turn) => ({ ...turn, answers: turn.answers.map((answer) => ({ ...answer, pieces: [[answer.text, []]] })) }));
    try { sessionStorage.setItem("page", JSON.stringify({ ...kept, turns })); } catch { sessionStorage.removeItem("page"); }
  }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem("page") || "{}");
    for (const name of KEPT) if (name in kept) state[name] = kept[name];
  } catch { sessionStorage.removeItem("page"); }
  for (const turn of state.turns) for (const answer of turn.answers) if (answer.status !== "done") answer.status = answer.error ? "failed" : "stopped";
}

// --------------------------------------------------------------------------------------------------------------------
// the API

const token = {
  get value() { return sessionStorage.getItem("token") || ""; },
  set value(text) { sessionStorage.setItem("token", text); },
};

function takeTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  token.value = given;
  history.replaceState(null, "", location.pathname);
}

class Refusal extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

async function ask(path, body, signal) {
  const headers = token.value ? { Authorization: `Bearer ${token.value}` } : {};
  const options = { headers, signal };
  if (body) Object.assign(options, { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const response = await fetch(path, options);
  if (response.ok) return response;
  const reply = await response.json().catch(() => ({}));
  if (response.status === 401) askForToken();
  throw new Refusal(response.status, reply.error || { message: `${response.status} ${response.statusText}` });
}

// Server-sent events: {data} or {comment}, one after the other.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (buffer + value).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith(": ")) yield { comment: block.slice(2) };
      else if (block.startsWith("data: ")) yield { data: block.slice(6) };
    }
  }
}

function askForToken() {
  $("token-error").hidden = !token.value;
  if (!$("token-box").open) $("token-box").showModal();
}

// --------------------------------------------------------------------------------------------------------------------
// requests

const modelOf = (name) => state.models.find((model) => model.id === name);
const pickedModels = () => state.picked.filter(Boolean);
const canChat = () => pickedModels().every((name) => modelOf(name)?.meta.chat);
const contextsOf = (name) => modelOf(name)?.meta.contexts ?? [];

function bodyOf(turn, number) {
  const body = { model: turn.answers[number].model, ...turn.settings, seed: turn.seed };
  if (turn.stops) body.stop = [turn.stops];
  if (turn.mode === "chat") return { ...body, messages: messagesOf(turn, number) };
  return { ...body, prompt: turn.prompt, truncate_prompt_tokens: -1 };
}

// The chat before a turn, without the oldest of its turns that no longer fit.
function messagesOf(turn, number) {
  const before = state.turns.slice(0, state.turns.indexOf(turn)).filter((other) => other.mode === "chat");
  const messages = turn.system ? [{ role: "system", content: turn.system }] : [];
  for (const earlier of before.slice(turn.answers[number].left_out || 0)) {
    const reply = earlier.answers[number] || earlier.answers[0];
    if (reply.status === "failed") continue;
    messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: reply.text });
  }
  return [...messages, { role: "user", content: turn.prompt }];
}

function newTurn(prompt) {
  const seed = state.seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(state.seed);
  const { mode, system, stops } = state;
  const answers = pickedModels().map((model) => ({ model, status: "waiting", text: "", pieces: [], lanes: null }));
  return { mode, prompt, seed, system: mode === "chat" ? system : "", stops: unescape_(stops), settings: { ...state.settings }, answers };
}

function unescape_(text) { // what one types for a line's end or a tab
  return text.replace(/\\(n|t|\\)/g, (_, char) => ({ n: "\n", t: "\t", "\\": "\\" })[char]);
}

async function run(turn) {
  running = new AbortController();
  showRunning(true);
  const signal = running.signal;
  await Promise.all(turn.answers.map((_, number) => draw(turn, number, signal)));
  running = null;
  showRunning(false);
  watchEngine();
  save();
  const facts = turn.answers.map((answer) => answer.error || `${answer.n} tokens`).join("; ");
  $("news").textContent = `Reply finished: ${facts}`;
}

async function draw(turn, number, signal) {
  const answer = turn.answers[number];
  Object.assign(answer, { status: "waiting", text: "", pieces: [], lanes: null, error: "", n: 0, place: 0, finish: "" });
  const view = viewOf(turn, number);
  view.refresh();
  for (;;) {
    try {
      await stream(turn, number, signal, view);
      return;
    } catch (error) {
      if (signal.aborted) {
        answer.status = "stopped";
      } else if (error.code === "context_length_exceeded" && messagesOf(turn, number).length > (turn.system ? 2 : 1)) {
        answer.left_out = (answer.left_out || 0) + 1;
        continue;
      } else {
        answer.status = "failed";
        answer.error = error instanceof Refusal ? error.message : `The server does not answer (${error.message}).`;
      }
      view.refresh();
      return;
    }
  }
}

async function stream(turn, number, signal, view) {
  const answer = turn.answers[number];
  const isChat = turn.mode === "chat";
  const asked = isChat ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
  const body = { ...bodyOf(turn, number), ...asked, stream: true, stream_options: { include_usage: true } };
  const response = await ask(isChat ? "/v1/chat/completions" : "/v1/completions", body, signal);
  let begun = 0;
  for await (const { data, comment } of events(response)) {
    if (comment?.startsWith("queue ")) answer.place = Number(comment.slice(6));
    if (!data || data === "[DONE]") { view.refresh(); continue; }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(500, chunk.error);
    if (chunk.usage) answer.n = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    if (!choice) continue;
    answer.place = 0;
    answer.status = "running";
    const pieces = take(answer, choice, isChat);
    begun ||= performance.now();
    const seconds = (performance.now() - begun) / 1000;
    if (answer.n > 1 && seconds > 0) answer.speed = (answer.n - 1) / seconds;
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    view.add(pieces);
  }
  if (!answer.finish) throw new Error("the stream ended early");
  answer.status = "done";
  view.refresh();
}

// Adds what a chunk brings to the answer; the new pieces, [text, tokens] each.
function take(answer, choice, isChat) {
  if (choice.contexts) return takeLanes(answer, choice.contexts);
  const text = (isChat ? choice.delta.content : choice.text) || "";
  const tokens = isChat ? (choice.logprobs?.content ?? []).map(ofChat) : ofCompletion(choice.logprobs);
  answer.n += tokens.length;
  answer.text += text;
  if (!text) return [];
  const piece = [text, tokens];
  answer.pieces.push(piece);
  return [piece];
}

// A token: its text, its log-probability, and the likeliest instead, [text, log-probability] each.
const ofChat = (token) => [token.token, token.logprob, token.top_logprobs.map((top) => [top.token, top.logprob])];
function ofCompletion(logprobs) {
  return (logprobs?.tokens ?? []).map((text, i) => [text, logprobs.token_logprobs[i], Object.entries(logprobs.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]).slice(0, ALTERNATIVES)]);
}

// The columns of all contexts: a token of each. A context may wait for a whole character while others go on.
function takeLanes(answer, contexts) {
  const names = Object.keys(contexts);
  answer.lanes ||= { names, columns: [], waiting: names.map(() => []) };
  const { columns, waiting } = answer.lanes;
  names.forEach((name, lane) => waiting[lane].push(...ofCompletion(contexts[name].logprobs)));
  const count = Math.min(...waiting.map((tokens) => tokens.length));
  const parts = waiting.map((tokens) => tokens.splice(0, count));
  const added = Array.from({ length: count }, (_, at) => parts.map((tokens) => tokens[at]));
  answer.n += count;
  answer.text += contexts[names[0]].text;
  columns.push(...added);
  return added;
}

// --------------------------------------------------------------------------------------------------------------------
// turns on the page

const views = new Map(); // answer -> its view

function viewOf(turn, number) { return views.get(turn.answers[number]); }

function showTurns() {
  views.clear();
  $("turns").replaceChildren(...state.turns.map(makeTurn));
  for (const view of views.values()) { view.draw(); view.refresh(); } // on the page, where lines have a width
  $("turns").classList.toggle("wide", state.turns.some((turn) => turn.answers.length > 1));
  $("turns").scrollTop = $("turns").scrollHeight;
}

function makeTurn(turn) {
  const node = make("article", { cls: `turn ${turn.mode}` });
  if (turn.mode === "chat") node.append(make("div", { cls: "user", text: turn.prompt }));
  const answers = make("div", { cls: "answers" });
  turn.answers.forEach((answer, number) => {
    const view = new AnswerView(turn, number);
    views.set(answer, view);
    answers.append(view.node);
  });
  node.append(answers);
  return node;
}

class AnswerView {
  constructor(turn, number) {
    this.turn = turn;
    this.answer = turn.answers[number];
    this.body = make("div", { cls: "body", tabIndex: 0 });
    this.body.setAttribute("role", "group");
    this.facts = make("span", { cls: "facts" });
    this.remark = make("div", { cls: "remark", hidden: true });
    const copy = make("button", { cls: "quiet", text: "Copy", type: "button" });
    copy.addEventListener("click", () => copyText(this.plainText(), copy));
    const again = make("button", { cls: "quiet", text: "Again", type: "button", title: "draw the last reply again" });
    again.addEventListener("click", () => drawAgain(this.turn));
    const code = make("button", { cls: "quiet", text: "Code", type: "button", title: "this request as curl or Python" });
    code.addEventListener("click", () => showCode(bodyOf(turn, number), turn.mode));
    this.node = make("div", { cls: "answer" }, make("div", { cls: "name", text: this.answer.model }), this.remark, this.body, make("div", { cls: "foot" }, this.facts, code, again, copy));
    this.again = again;
    this.body.addEventListener("keydown", (event) => walkTokens(event, this.body));
  }

  plainText() {
    const { lanes, text } = this.answer;
    if (!lanes) return this.turn.mode === "chat" ? text : this.turn.prompt + text;
    return lanes.names.map((name, lane) => `${name}: ${lanes.columns.map((column) => column[lane][0]).join("")}`).join("\n");
  }

  draw() {
    this.block = null;
    this.body.replaceChildren();
    const { lanes, pieces } = this.answer;
    if (this.turn.mode === "completion") this.drawPrompt(lanes);
    this.append(lanes ? lanes.columns : pieces);
  }

  drawPrompt(lanes) {
    const { prompt } = this.turn;
    if (lanes) this.appendColumn(lanes.names.map((name) => [typeof prompt === "string" ? prompt : prompt[name]]), "prompt");
    else if (typeof prompt === "string") this.body.append(make("span", { cls: "prompt", text: prompt }));
  }

  append(pieces) {
    if (this.answer.lanes) pieces.forEach((column) => this.appendColumn(column));
    else this.body.append(...pieces.flatMap(tokensOf));
  }

  // A token of each context, below each other; a line ends where it is full, or where the first context's ends.
  appendColumn(column, cls = "") {
    const width = Math.max(...column.map(([text]) => [...text.replaceAll("\n", "")].length));
    const labels = Math.min(14, Math.max(...this.answer.lanes.names.map((name) => name.length)));
    this.room ||= roomIn(this.body) - labels - 2;
    if (!this.block || this.block.width + width > this.room) {
      const lines = this.answer.lanes.names.map((name) => {
        const label = make("b", { text: name, title: name });
        label.style.width = `${labels}ch`;
        return make("div", { cls: "lane" }, label, make("span"));
      });
      this.block = { width: 0, lines: lines.map((line) => line.lastChild) };
      this.body.append(make("div", { cls: "lanes" }, ...lines));
    }
    column.forEach((token, lane) => {
      const shown = token[0].replaceAll("\n", "");
      const span = cls ? make("span", { cls, text: shown }) : tokenSpan(shown, [token]);
      this.block.lines[lane].append(span, " ".repeat(width - [...shown].length));
    });
    this.block.width += width;
    if (column[0][0].includes("\n")) this.block = null;
  }

  add(pieces) {
    const turns = $("turns");
    const follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
    if (!this.node.classList.contains("begun") && this.answer.lanes) this.draw();
    else this.append(pieces);
    this.node.classList.add("begun");
    this.refresh();
    if (follows) turns.scrollTop = turns.scrollHeight;
  }

  refresh() {
    const { answer, turn } = this;
    const isRunning = answer.status === "running" || answer.status === "waiting";
    if (answer.status === "waiting") { this.node.classList.remove("begun"); if (!answer.pieces.length) this.draw(); }
    this.node.classList.toggle("running", isRunning);
    this.body.setAttribute("aria-label", `Reply of ${answer.model}; arrow keys go through its tokens`);
    this.again.hidden = isRunning || turn !== state.turns.at(-1);
    this.remark.hidden = !answer.left_out;
    this.remark.textContent = answer.left_out ? `The oldest ${answer.left_out === 1 ? "turn" : `${answer.left_out} turns`} no longer fit the context and were left out.` : "";
    this.body.querySelector(".error")?.remove();
    if (answer.error) this.body.append(make("p", { cls: "error", text: answer.error }));
    this.facts.textContent = factsOf(answer, turn);
  }
}

function factsOf(answer, turn) {
  if (answer.status === "waiting") return answer.place ? `waiting: place ${answer.place} in the queue` : "reading the prompt …";
  const facts = [`${answer.n} token${answer.n === 1 ? "" : "s"}`];
  if (answer.speed) facts.push(`${answer.speed < 10 ? answer.speed.toFixed(1) : Math.round(answer.speed)} tokens/s`);
  if (answer.status === "stopped") facts.push("stopped");
  if (answer.finish === "length") facts.push("at max tokens");
  facts.push(`seed ${turn.seed}`);
  return facts.join(" · ");
}

// How many characters of its font a line of a node has.
function roomIn(node) {
  const probe = make("span", { text: "0".repeat(40) });
  node.append(probe);
  const style = getComputedStyle(node);
  const width = node.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const room = Math.floor(width / (probe.getBoundingClientRect().width / 40));
  probe.remove();
  return Math.max(20, room);
}

// --------------------------------------------------------------------------------------------------------------------
// tokens and their alternatives

const details = new WeakMap(); // span -> its tokens

// The spans of a piece: one for each token, or one for all where they make characters together.
function tokensOf([text, tokens]) {
  const isClear = tokens.length > 0 && tokens.map(([own]) => own).join("") === text;
  if (isClear) return tokens.map((token) => tokenSpan(token[0], [token]));
  return [tokenSpan(text, tokens)];
}

function tokenSpan(text, tokens) {
  const span = make("span", { text, cls: "t" });
  if (!tokens.length) return span;
  const logprob = tokens.reduce((sum, token) => sum + token[1], 0);
  span.classList.add(shadeOf(Math.exp(logprob)));
  if (text.includes("\n")) span.classList.add("nl");
  details.set(span, { text, tokens, logprob });
  return span;
}

function shadeOf(p) { return p > 0.7 ? "q1" : p > 0.35 ? "q2" : p > 0.12 ? "q3" : p > 0.03 ? "q4" : "q5"; }

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
const percent = (p) => (p >= 0.1 ? `${(100 * p).toFixed(0)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "<0.1%");

let pointed = null;

function point(span) {
  if (span === pointed) return;
  pointed?.classList.remove("on");
  pointed = span && details.has(span) ? span : null;
  $("tip").hidden = !pointed;
  if (!pointed) return;
  pointed.classList.add("on");
  const { text, tokens, logprob } = details.get(pointed);
  const rows = tokens.length === 1 ? [...tokens[0][2]] : [];
  if (!rows.some(([other]) => other === tokens[0][0])) rows.push([tokens.length === 1 ? tokens[0][0] : text, logprob]);
  const drawn = tokens.length === 1 ? tokens[0][0] : text;
  const table = make("table", {}, ...rows.map(([other, lp]) => {
    const bar = make("i");
    bar.style.width = `${100 * Math.exp(lp)}%`;
    return make("tr", { cls: other === drawn ? "drawn" : "" }, make("td", { cls: "s", text: visible(other) }), make("td", { cls: "p", text: percent(Math.exp(lp)) }), make("td", { cls: "bar" }, bar));
  }));
  const note = tokens.length > 1 ? [make("p", { cls: "note", text: `${tokens.length} tokens together` })] : [];
  $("tip").replaceChildren(table, ...note);
  place($("tip"), pointed.getClientRects()[0] ?? pointed.getBoundingClientRect());
}

// Puts the tip below a token, or above it where there is no room.
function place(tip, rect) {
  const { width, height } = tip.getBoundingClientRect();
  const below = rect.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(rect.left - 12, innerWidth - width - 8))}px`;
  tip.style.top = `${below ? rect.bottom + 6 : Math.max(8, rect.top - height - 6)}px`;
}

function walkTokens(event, body) {
  const spans = [...body.querySelectorAll(".t")].filter((span) => details.has(span));
  const at = spans.indexOf(pointed);
  const next = { ArrowRight: at + 1, ArrowLeft: at < 0 ? spans.length - 1 : at - 1, Home: 0, End: spans.length - 1 }[event.key];
  if (next === undefined || event.ctrlKey || event.metaKey || event.altKey || !spans.length) return;
  event.preventDefault();
  const span = spans[Math.max(0, Math.min(next, spans.length - 1))];
  span.scrollIntoView({ block: "nearest" });
  point(span);
  const { text, logprob, tokens } = details.get(span);
  const others = tokens[0][2].filter(([other]) => other !== tokens[0][0]).map(([other, lp]) => `${visible(other)} ${percent(Math.exp(lp))}`);
  $("news").textContent = `${visible(text)}, ${percent(Math.exp(logprob))}; instead ${others.join(", ")}`;
}

// --------------------------------------------------------------------------------------------------------------------
// the composer

function showRunning(isRunning) {
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("clear").disabled = isRunning;
}

function promptFromInputs() {
  const areas = [...$("inputs").querySelectorAll("textarea")];
  if (areas.length === 1) return areas[0].value;
  return Object.fromEntries(areas.map((area) => [area.dataset.context, area.value]));
}

function send() {
  if (running) return;
  const prompt = promptFromInputs();
  const isText = typeof prompt === "string";
  if (state.mode === "chat" && !prompt.trim()) return;
  if (!isText && Object.values(prompt).some((text) => !text)) { note("Each context needs a text, all of the same length in tokens."); return; }
  note("");
  const turn = newTurn(prompt);
  state.turns.push(turn);
  showTurns();
  if (state.mode === "chat") { $("input").value = ""; grow($("input")); }
  save();
  run(turn);
}

function drawAgain(turn) {
  if (running) return;
  if (state.seed === "") turn.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  else turn.seed = Number(state.seed);
  turn.settings = { ...state.settings };
  run(turn);
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function onInputKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

// One text, or one for each context of the model.
function showInputs() {
  const contexts = contextsOf(state.picked[0]);
  const key = contexts.join("\n");
  if ($("inputs").dataset.key === key) return;
  $("inputs").dataset.key = key;
  if (!contexts.length) {
    $("inputs").replaceChildren(inputLabel, makeArea("input"));
    grow($("input"));
    return;
  }
  $("inputs").replaceChildren(...contexts.map((name, number) => {
    const area = makeArea(number ? `input-${number}` : "input");
    area.dataset.context = name;
    return make("div", { cls: "lane-input" }, make("label", { htmlFor: area.id, text: name }), area);
  }));
  $("inputs").querySelectorAll("textarea").forEach(grow);
}

const inputLabel = $("input-label");
function makeArea(id) {
  const area = make("textarea", { id, rows: 1, spellcheck: false, autocomplete: "off" });
  area.setAttribute("enterkeyhint", "send");
  area.addEventListener("keydown", onInputKey);
  area.addEventListener("input", () => grow(area));
  return area;
}

// --------------------------------------------------------------------------------------------------------------------
// settings

function makeSliders() {
  for (const [name, label, low, high, step] of SLIDERS) {
    const range = make("input", { type: "range", min: low, max: high, step, id: `range-${name}` });
    const number = make("input", { type: "number", min: low, step, id: name, inputMode: "decimal" });
    range.setAttribute("aria-label", label);
    const set = (value) => {
      if (value === "" || !Number.isFinite(Number(value))) return;
      state.settings[name] = Number(value);
      save();
    };
    range.addEventListener("input", () => { number.value = range.value; set(range.value); });
    number.addEventListener("input", () => { range.value = number.value; set(number.value); });
    $("sliders").append(make("div", { cls: "slider" }, make("label", { htmlFor: name, text: label }), number, range));
  }
}

function showSettings() {
  for (const [name] of SLIDERS) for (const id of [name, `range-${name}`]) $(id).value = state.settings[name];
  $("system").value = state.system;
  $("seed").value = state.seed;
  $("stops").value = state.stops;
  $("colours").checked = state.colours;
  document.body.classList.toggle("coloured", state.colours);
}

function showMode() {
  const chat = canChat();
  if (!chat) state.mode = "completion";
  for (const input of document.querySelectorAll("[name=mode]")) {
    input.checked = input.value === state.mode;
    input.disabled = input.value === "chat" && !chat;
    input.parentNode.title = input.disabled ? "needs models that were trained on messages" : "";
  }
  const isChat = state.mode === "chat";
  const contexts = contextsOf(state.picked[0]);
  $("system-box").hidden = !isChat;
  showInputs();
  inputLabel.textContent = isChat ? "Message" : "Prompt";
  if (!contexts.length) $("input").placeholder = isChat ? "Message" : "Text to continue";
  const what = contexts.length ? `It continues ${contexts.length} aligned contexts together: ${contexts.join(", ")}.` : isChat ? "Ask it something." : "It continues your text.";
  $("empty-text").textContent = what;
  const ideas = contexts.length ? [] : isChat ? ["What is the capital of France?", "Write a haiku about small models.", "Explain gravity to a child."] : ["Once upon a time", "The meaning of life is", "\n"];
  $("ideas").replaceChildren(...ideas.map((idea) => {
    const button = make("button", { type: "button", text: idea === "\n" ? "an empty line" : idea });
    button.addEventListener("click", () => { $("input").value = idea; send(); });
    return button;
  }));
}

function showModels() {
  const names = state.models.map((model) => model.id);
  if (!names.includes(state.picked[0])) state.picked[0] = names[0];
  if (state.picked[1] && !names.includes(state.picked[1])) state.picked[1] = "";
  const [a, b] = [$("model-a"), $("model-b")];
  for (const select of [a, b]) select.replaceChildren(...names.map((name) => make("option", { value: name, text: name })));
  a.value = state.picked[0];
  const comparable = names.filter((name) => name !== a.value && contextsOf(name).join() === contextsOf(a.value).join());
  b.replaceChildren(...comparable.map((name) => make("option", { value: name, text: name })));
  if (state.picked[1] && !comparable.includes(state.picked[1])) state.picked[1] = comparable[0] || "";
  b.value = state.picked[1];
  b.hidden = !state.picked[1];
  $("compare").hidden = !comparable.length;
  $("compare").setAttribute("aria-pressed", String(Boolean(state.picked[1])));
  showMode();
}

function resetSettings() {
  state.settings = Object.fromEntries(SLIDERS.map(([name]) => [name, state.defaults[name]]));
  Object.assign(state, { seed: "", stops: "" });
  showSettings();
  save();
}

// --------------------------------------------------------------------------------------------------------------------
// the request as code

const code = { body: {}, mode: "chat", kind: "curl" };

function showCode(body, mode) {
  Object.assign(code, { body, mode });
  writeCode();
  if (!$("code-box").open) $("code-box").showModal();
}

function writeCode() {
  for (const tab of document.querySelectorAll("[data-code]")) tab.setAttribute("aria-selected", String(tab.dataset.code === code.kind));
  $("code-text").textContent = (code.kind === "curl" ? asCurl : asPython)(code.body, code.mode);
}

function asCurl(body, mode) {
  const lines = [`curl ${location.origin}/v1/${mode === "chat" ? "chat/" : ""}completions`, `  -H "Content-Type: application/json"`];
  if (token.value) lines.push(`  -H "Authorization: Bearer $TOKEN"`);
  lines.push(`  -d '${JSON.stringify(body, null, 2).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n");
}

function asPython(body, mode) {
  const { top_k, min_p, repetition_penalty, truncate_prompt_tokens, ...known } = body;
  const extra = { top_k, min_p, repetition_penalty };
  if (truncate_prompt_tokens) extra.truncate_prompt_tokens = truncate_prompt_tokens;
  if (typeof known.prompt === "object") { extra.prompt = known.prompt; known.prompt = ""; }
  const fields = Object.entries(known).map(([name, value]) => `    ${name}=${python(value)},`);
  const call = mode === "chat" ? "chat.completions" : "completions";
  const text = mode === "chat" ? "message.content" : "text";
  return [
    "from openai import OpenAI", "", `client = OpenAI(base_url="${location.origin}/v1", api_key=${token.value ? "TOKEN" : '"none"'})`,
    `reply = client.${call}.create(`, ...fields, `    extra_body=${python(extra)},`, ")", `print(reply.choices[0].${text})`,
  ].join("\n");
}

function python(value) { // a JSON value as Python writes it
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item)}`).join(", ")}}`;
  return { true: "True", false: "False", null: "None" }[String(value)] ?? JSON.stringify(value);
}

async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // without a secure context there is no clipboard
    const area = make("textarea", { value: text });
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1200);
}

// --------------------------------------------------------------------------------------------------------------------
// the engine's state, and the start

let watching = 0;

async function watchEngine() {
  clearTimeout(watching);
  if (document.visibilityState === "visible" && state.models.length) {
    try {
      const { models } = await (await ask("/state")).json();
      const sum = (name) => Object.values(models).reduce((total, model) => total + model[name], 0);
      const [busy, waiting, speed] = [sum("running"), sum("waiting"), sum("tokens_per_second")];
      const facts = [];
      if (busy) facts.push(`${Math.round(speed)} tokens/s`, `${busy} running`);
      if (waiting) facts.push(`${waiting} waiting`);
      $("engine").textContent = facts.join(" · ") || "ready";
      $("engine").className = busy ? "busy" : "";
    } catch (error) {
      $("engine").textContent = error instanceof Refusal ? "" : "the server does not answer";
      $("engine").className = "gone";
    }
  }
  watching = setTimeout(watchEngine, running ? 700 : 2000);
}

async function load() {
  const [models, engine] = await Promise.all([ask("/v1/models"), ask("/state")]);
  state.models = (await models.json()).data;
  state.defaults = (await engine.json()).defaults;
  state.settings = { ...Object.fromEntries(SLIDERS.map(([name]) => [name, state.defaults[name]])), ...state.settings };
  if ($("token-box").open) $("token-box").close();
  showModels();
  showSettings();
  showTurns();
  $("input").focus();
}

function listen() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => { state.turns = []; note(""); showTurns(); save(); $("input").focus(); });
  $("code").addEventListener("click", () => {
    const turn = newTurn(promptFromInputs());
    state.turns.push(turn); // for the chat before it
    const body = bodyOf(turn, 0);
    state.turns.pop();
    showCode(body, turn.mode);
  });
  $("model-a").addEventListener("change", (event) => { state.picked[0] = event.target.value; if (state.picked[1] === state.picked[0]) state.picked[1] = ""; showModels(); save(); });
  $("model-b").addEventListener("change", (event) => { state.picked[1] = event.target.value; showModels(); save(); });
  $("compare").addEventListener("click", () => { state.picked[1] = state.picked[1] ? "" : $("model-b").options[0].value; showModels(); save(); });
  for (const input of document.querySelectorAll("[name=mode]")) input.addEventListener("change", () => { state.mode = input.value; showMode(); save(); $("input").focus(); });
  for (const name of ["system", "seed", "stops"]) $(name).addEventListener("input", (event) => { state[name] = name === "seed" ? event.target.value.replace(/\D/g, "") : event.target.value; if (name === "seed") event.target.value = state.seed; save(); });
  $("colours").addEventListener("change", (event) => { state.colours = event.target.checked; showSettings(); save(); });
  $("reset").addEventListener("click", resetSettings);
  $("toggle-settings").addEventListener("click", () => toggleSettings());
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("turns").addEventListener("pointerover", (event) => { if (event.pointerType === "mouse") point(event.target.closest(".t")); });
  $("turns").addEventListener("click", (event) => point(event.target.closest(".t")));
  $("turns").addEventListener("pointerleave", () => point(null));
  $("turns").addEventListener("focusout", () => point(null));
  $("turns").addEventListener("scroll", () => point(null), { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (pointed) point(null);
    else if (running) running.abort();
    else toggleSettings(false);
  });
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  for (const tab of document.querySelectorAll("[data-code]")) tab.addEventListener("click", () => { code.kind = tab.dataset.code; writeCode(); });
  $("code-copy").addEventListener("click", () => copyText($("code-text").textContent, $("code-copy")));
  $("token-form").addEventListener("submit", (event) => { event.preventDefault(); token.value = $("token").value.trim(); $("token").value = ""; load().catch(() => {}); });
  let width = innerWidth;
  addEventListener("resize", () => {
    document.documentElement.style.setProperty("--header", `${document.querySelector("header").offsetHeight}px`);
    if (innerWidth === width || running) return;
    width = innerWidth;
    $("inputs").querySelectorAll("textarea").forEach(grow);
    if (state.turns.some((turn) => turn.answers.some((answer) => answer.lanes))) showTurns();
  });
}

function toggleSettings(open = !$("settings").classList.contains("open")) {
  $("settings").classList.toggle("open", open);
  $("toggle-settings").setAttribute("aria-expanded", String(open));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

takeTokenFromAddress();
setTheme(localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
restore();
makeSliders();
listen();
document.documentElement.style.setProperty("--header", `${document.querySelector("header").offsetHeight}px`);
load().catch((error) => { if (error.status !== 401) note(`The server does not answer: ${error.message}`); });
watchEngine();
