// The chat page. Owns: what is on the screen and the conversation, which lives only as long as the page.
// Does not own: the stream (stream.js), the snippets (clients.js).
// Invariant: text of models and people reaches the page as text nodes only, never as markup.

import { CLIENTS } from "./clients.js";
import { chat, messageOf } from "./stream.js";

const MODELS_AGAIN_MS = 3000; // while no model is ready
const RATE_SHOWN_AFTER_MS = 300; // a rate over less time says nothing

const $ = (id) => document.getElementById(id);
const thread = $("thread");
const prompt = $("prompt");
let models = [];
let history = [];
let running = null; // the AbortController of the answer under way

// -- models ------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    const answer = await fetch("/v1/models", { headers: key() ? { Authorization: `Bearer ${key()}` } : {} });
    if (!answer.ok) throw new Error(await messageOf(answer));
    models = (await answer.json()).data;
    if (!running) say("");
  } catch (error) {
    say(error.message);
  }
  showModels();
  if (!models.some((model) => model.state === "ready")) setTimeout(loadModels, MODELS_AGAIN_MS);
}

function showModels() {
  const before = $("model").value;
  $("model").replaceChildren(...models.map((model) => {
    const option = element("option", "", model.state === "ready" ? model.id : `${model.id} (${model.state})`);
    option.value = model.id;
    return option;
  }));
  const ready = models.find((model) => model.state === "ready");
  const kept = models.find((model) => model.id === before);
  $("model").value = (kept && (kept.state === "ready" || !ready) ? kept : ready ?? models[0])?.id ?? "";
  showFacts();
}

function chosen() {
  return models.find((model) => model.id === $("model").value);
}

function showFacts() {
  const model = chosen();
  const facts = model ? [
    ["State", model.state],
    ["Context", `${model.max_context.toLocaleString()} tokens`],
    ...(model.aliases.length ? [["Also named", model.aliases.join(", ")]] : []),
  ] : [["Models", "none is configured"]];
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

// -- the conversation --------------------------------------------------------------------------------

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Cut text at its fenced blocks: [{code, text}], also while the last fence is still open. */
function blocks(text) {
  const found = [{ code: false, lines: [] }];
  for (const line of text.split("\n")) {
    const last = found.at(-1);
    if (last.code ? line.trimEnd() === "```" : /^```[^`]*$/.test(line)) found.push({ code: !last.code, lines: [] });
    else last.lines.push(line);
  }
  return found.map(({ code, lines }) => ({ code, text: lines.join("\n") }));
}

/** Show text with fenced blocks as code; everything goes in as text nodes. */
function showText(place, text) {
  const cut = blocks(text);
  place.replaceChildren(...cut.map(({ code, text: part }, at) => {
    if (!code) {
      // A code block has its own distance: empty lines beside it would double that.
      const start = at > 0 ? part.replace(/^\n+/, "") : part;
      return document.createTextNode(at < cut.length - 1 ? start.replace(/\n+$/, "") : start);
    }
    const block = element("pre");
    block.append(element("code", "", part));
    return block;
  }));
}

function addTurn(role) {
  $("empty")?.remove();
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  thread.append(turn);
  return turn;
}

function atBottom() {
  return thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
}

function follow(change) {
  const stays = atBottom();
  change();
  if (stays) thread.scrollTop = thread.scrollHeight;
}

/** One answer on the screen: its reasoning, its text, its facts. Draws at most once per frame. */
class AnswerView {
  constructor() {
    this.turn = addTurn("model");
    this.turn.classList.add("busy");
    this.body = element("div", "text");
    this.turn.append(this.body);
    this.text = "";
    this.reasoning = "";
    this.frame = 0;
  }

  add({ content, reasoning_content: reasoning }) {
    this.text += content ?? "";
    this.reasoning += reasoning ?? "";
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    follow(() => {
      if (this.reasoning && !this.thought) {
        this.thought = element("details");
        this.thought.open = true;
        this.thoughtText = element("div", "text");
        this.thought.append(element("summary", "", "Reasoning"), this.thoughtText);
        this.turn.prepend(this.thought);
      }
      if (this.thought) this.thoughtText.textContent = this.reasoning;
      showText(this.body, this.text);
    });
  }

  end(facts, error) {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.turn.classList.remove("busy");
    if (this.thought && this.text) this.thought.open = false;
    follow(() => {
      if (error) this.turn.append(element("p", "error", error));
      if (facts) this.turn.append(element("p", "facts", facts));
    });
  }
}

/** Counts tokens since the first one came. */
class Rate {
  constructor() {
    this.askedAt = performance.now();
    this.firstAt = 0;
    this.tokens = 0;
  }

  note(chunk) {
    const counted = chunk.usage?.completion_tokens ?? 0;
    if (counted > 0 && !this.firstAt) { this.firstAt = performance.now(); this.first = counted; }
    if (counted > this.tokens) { this.tokens = counted; this.lastAt = performance.now(); }
  }

  get perSecond() {
    const ms = this.lastAt - this.firstAt;
    return this.firstAt && ms >= RATE_SHOWN_AFTER_MS ? (this.tokens - this.first) / ms * 1000 : null;
  }

  toString() {
    const parts = [`${this.tokens} tokens`];
    if (this.perSecond !== null) parts.push(`${this.perSecond.toFixed(1)} tokens/s`);
    if (this.firstAt) parts.push(`first after ${((this.firstAt - this.askedAt) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }
}

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: Number($("temperature").value),
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const most = Number.parseInt($("max-tokens").value, 10);
  if (most > 0) body.max_tokens = most;
  return body;
}

async function send() {
  const text = prompt.value.trim();
  if (!text || running) return;
  const turn = addTurn("user");
  const shown = element("div", "text", text);
  turn.append(shown);
  history.push({ role: "user", content: text });
  prompt.value = "";
  fitPrompt();
  thread.scrollTop = thread.scrollHeight;
  await answer();
}

async function answer() {
  const mine = history; // a new chat must not get an old one's answer
  const abort = busy(new AbortController());
  const view = new AnswerView();
  const rate = new Rate();
  let finish = "";
  let failure = "";
  say("waiting");
  try {
    for await (const chunk of chat(requestBody(), { key: key(), signal: abort.signal })) {
      rate.note(chunk);
      const choice = chunk.choices?.[0];
      if (choice?.delta) view.add(choice.delta);
      finish = choice?.finish_reason ?? finish;
      if (rate.tokens) say(rate.perSecond === null ? `${rate.tokens} tokens` : `${rate.perSecond.toFixed(1)} tokens/s`);
    }
  } catch (error) {
    finish = abort.signal.aborted ? "stopped" : "";
    failure = abort.signal.aborted ? "" : error.message;
  }
  const endings = { length: "cut at max tokens", stopped: "stopped" };
  view.end([rate.tokens ? String(rate) : "", endings[finish] ?? ""].filter(Boolean).join(" · "), failure);
  if (view.text) mine.push({ role: "assistant", content: view.text });
  else if (failure) mine.pop(); // what was never answered is not part of the conversation
  if (running === abort) busy(null);
  say("");
}

// -- controls ----------------------------------------------------------------------------------------

const key = () => $("key").value.trim();
const say = (text) => { $("status").textContent = text; };

function busy(abort) {
  running = abort;
  $("send").hidden = abort !== null;
  $("stop").hidden = abort === null;
  if (abort === null) prompt.focus();
  return abort;
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function newChat() {
  running?.abort();
  history = [];
  thread.replaceChildren(element("p", "", "Ask something."));
  thread.firstChild.id = "empty";
  busy(null);
}

let client = CLIENTS[0];

function showClient() {
  const model = chosen();
  const at = { base: location.origin, model: model?.id ?? "MODEL", context: model?.max_context };
  for (const tab of $("tabs").children) {
    const selected = tab.textContent === client.name;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
  }
  $("where").textContent = client.where;
  $("snippet").textContent = client.text(at);
  $("copied").textContent = "";
}

function addTabs() {
  $("tabs").append(...CLIENTS.map((each) => {
    const tab = element("button", "", each.name);
    tab.type = "button";
    tab.setAttribute("role", "tab");
    tab.addEventListener("click", () => { client = each; showClient(); });
    return tab;
  }));
  $("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    client = CLIENTS[(CLIENTS.indexOf(client) + step + CLIENTS.length) % CLIENTS.length];
    showClient();
    [...$("tabs").children].find((tab) => tab.tabIndex === 0).focus();
  });
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copied").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("snippet")); // no clipboard without a secure context
    $("copied").textContent = "Selected: copy it with your keyboard";
  }
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("stop").addEventListener("click", () => running?.abort());
$("new-chat").addEventListener("click", newChat);
$("model").addEventListener("change", showFacts);
$("key").addEventListener("change", loadModels);
$("temperature").addEventListener("input", (event) => {
  $("temperature-shown").textContent = Number(event.target.value).toFixed(1);
});
$("show-settings").addEventListener("click", (event) => {
  const open = $("settings").classList.toggle("open");
  event.target.setAttribute("aria-expanded", String(open));
});
$("show-clients").addEventListener("click", () => { showClient(); $("clients").showModal(); });
$("close-clients").addEventListener("click", () => $("clients").close());
$("copy").addEventListener("click", copy);
prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  // An Enter that ends the input of a composed character is not one that sends.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("clients").open) running?.abort();
});
addTabs();
loadModels();
