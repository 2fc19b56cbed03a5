// The page of `serve`: a text that each model continues while one types, and the state of each conversation.
// All text of models, runs and corpora is set as textContent, never as HTML.

const DEBOUNCE_MS = 250;
const ALTERNATIVES = 8;
const element = (id) => document.getElementById(id);
const prefix = element("prefix");
const cards = [];

class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function request(path, body, { method = "POST", ...options } = {}) {
  const headers = { "Content-Type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(`v1/${path}`, { method, headers, body: body && JSON.stringify(body), ...options });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: { message: response.statusText } }));
  throw new ApiError(response.status, error.message, Number(response.headers.get("Retry-After")));
}

/** Yields the name and data of each server-sent event of a response. */
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (buffer + value).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

function percent(probability) {
  return probability < 0.001 ? "<0.1 %" : `${(100 * probability).toFixed(1)} %`;
}

/** The options of sampling, as the API names them. */
function sampling() {
  const value = (id) => Number(element(id).value);
  const temperature = value("temperature");
  const truncation = temperature ? { top_k: value("top_k"), top_p: value("top_p") } : {};
  return { temperature, ...truncation, length: value("length"), seed: Math.max(0, Math.floor(value("seed"))) };
}

function showOptions() {
  const { temperature, top_k: topK, top_p: topP, length } = sampling();
  const texts = {
    temperature: temperature ? temperature.toFixed(2) : "greedy",
    top_k: topK || "all",
    top_p: (topP ?? 1).toFixed(2),
    length: `${length} tokens`,
  };
  for (const [id, text] of Object.entries(texts)) document.querySelector(`output[for="${id}"]`).textContent = text;
  for (const id of ["top_k", "top_p", "seed", "resample"]) element(id).disabled = !temperature;
}

/** A model, its conversation on the server, and what it generates. */
class Card {
  constructor(model) {
    this.model = model;
    this.root = element("card").content.cloneNode(true).firstElementChild;
    const find = (selector) => this.root.querySelector(selector);
    find("h2").textContent = model.name;
    const size = model.vocabulary_size.toLocaleString("en");
    find(".about").textContent = `${model.description} · step ${model.step.toLocaleString("en")} · ${size} tokens (${model.vocabulary})`;
    [this.keptText, this.typed, this.continuation] = [find(".kept"), find(".typed"), find(".continuation")];
    [this.text, this.status, this.title, this.bars] = [find(".text"), find(".status"), find("h3"), find(".bars")];
    this.continuation.addEventListener("click", (event) => this.select(this.indexOf(event.target)));
    this.continuation.addEventListener("focusin", (event) => this.select(this.indexOf(event.target)));
    this.continuation.addEventListener("keydown", (event) => this.moveFocus(event));
    this.isFollowing = true;
    this.text.addEventListener("scroll", () => {
      this.isFollowing = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 30;
    });
    this.controller = new AbortController();
    this.chosen = []; // tokens after the typed text that were chosen, or generated before a chosen one
    this.clear();
  }

  get conversation() {
    return `conversations/${this.id}`;
  }

  get hasState() {
    return this.keptText.textContent !== "";
  }

  async connect() {
    const response = await request("conversations", { model: this.model.name });
    this.id = (await response.json()).id;
    this.keptText.textContent = "";
  }

  clear() {
    this.tokens = [];
    this.selected = 0;
    this.continuation.replaceChildren();
    this.showBars();
  }

  say(message, isError = false) {
    this.status.textContent = message;
    this.status.classList.toggle("error", isError);
  }

  abort() {
    this.controller.abort();
    this.controller = new AbortController();
    this.isRunning = false;
    showRunning();
  }

  /** Continues the typed text and the chosen tokens from the state, which stays as it is. */
  async generate() {
    if (!this.id) return;
    this.abort();
    const { signal } = this.controller;
    const text = prefix.value;
    this.typed.textContent = this.separated(text);
    if (!text && !this.hasState) {
      this.clear();
      return this.say("");
    }
    this.isRunning = true;
    showRunning();
    this.continuation.classList.add("stale");
    try {
      await this.stream({ text, tokens: this.chosen.map((token) => token.id), ...sampling() }, signal);
    } catch (error) {
      if (signal.aborted) return;
      this.recover(error, signal);
    } finally {
      this.continuation.classList.remove("stale");
    }
    this.isRunning = false;
    showRunning();
  }

  async stream(body, signal) {
    const response = await request(`${this.conversation}/generate`, { ...body, keep: false, alternatives: ALTERNATIVES }, { signal });
    this.clear();
    this.say("generating …");
    this.continuation.classList.remove("stale");
    for (const token of this.chosen) this.add(token);
    this.selected = this.tokens.length && this.tokens.length - 1;
    for await (const [name, data] of readEvents(response)) {
      if (signal.aborted) return;
      if (name === "token") this.add(data);
      else this.end(data);
    }
  }

  end({ reason, text }) {
    this.continuation.append(text);
    const count = `${this.tokens.length} tokens`;
    if (reason === "failed") this.say("the model failed: see the log of the server", true);
    else this.say(reason === "cancelled" ? `${count}, stopped by the server` : count);
  }

  recover(error, signal) {
    if (error.status === 401) return logIn();
    if (error.status === 429) {
      this.say("the server is busy, retrying …");
      setTimeout(() => signal.aborted || this.generate(), 1000 * (error.retryAfter || 1));
    } else if (error.status === 404) {
      this.chosen = [];
      this.connect().then(() => this.generate(), (failure) => this.say(failure.message, true));
    } else {
      this.clear();
      this.say(error.status ? error.message : "the server cannot be reached", true);
    }
  }

  /** The typed text with the blank that is between two words. */
  separated(text) {
    const needsBlank = this.model.vocabulary === "word" && this.hasState && text && !/\s$/.test(this.keptText.textContent);
    return needsBlank && !/^\s/.test(text) ? ` ${text}` : text;
  }

  add(token) {
    const index = this.tokens.push(token) - 1;
    if (token.text) {
      const span = document.createElement("span");
      span.className = "token";
      span.textContent = token.text;
      span.dataset.index = index;
      span.tabIndex = this.continuation.firstChild ? -1 : 0;
      span.setAttribute("role", "button");
      span.setAttribute("aria-label", `${visible(token.text)}, ${percent(token.probability)}`);
      span.style.setProperty("--probability", token.probability);
      this.continuation.append(span);
      this.followEnd();
    }
    if (index === this.selected) this.showBars();
  }

  /** Scrolls to the end once a frame, unless the user has scrolled away from it. */
  followEnd() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      if (this.isFollowing) this.text.scrollTop = this.text.scrollHeight;
    });
  }

  indexOf(target) {
    return target.dataset?.index === undefined ? -1 : Number(target.dataset.index);
  }

  select(index) {
    if (index < 0) return;
    this.selected = index;
    for (const span of this.continuation.children) {
      const isSelected = this.indexOf(span) === index;
      span.setAttribute("aria-pressed", isSelected);
      span.tabIndex = isSelected ? 0 : -1;
    }
    this.showBars();
  }

  moveFocus(event) {
    const { target, key } = event;
    const next = { ArrowRight: target.nextElementSibling, ArrowLeft: target.previousElementSibling }[key];
    if (next) {
      event.preventDefault();
      next.focus();
    } else if (key === "Enter" || key === " ") {
      event.preventDefault();
      this.bars.querySelector("button")?.focus();
    }
  }

  showBars() {
    const token = this.tokens[this.selected];
    this.title.textContent = token ? (this.selected ? `Instead of token ${this.selected + 1}` : "Next token") : "";
    this.bars.replaceChildren(...(token?.alternatives ?? []).map((alternative) => this.bar(alternative, token)));
  }

  /** The visible text of a token; of a byte that is no character, its value, since all others look alike. */
  nameOf({ id, text }) {
    const isHidden = this.model.vocabulary === "byte" && id < 256 && /[^\t\n -~]/.test(text);
    return isHidden ? `\\x${id.toString(16).padStart(2, "0")}` : visible(text);
  }

  bar(alternative, token) {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    const [label, value] = [document.createElement("span"), document.createElement("span")];
    label.textContent = this.nameOf(alternative);
    value.textContent = percent(alternative.probability);
    value.className = "percent";
    button.type = "button";
    button.title = "Continue with this token";
    button.className = alternative.id === token.id ? "chosen" : "";
    button.style.setProperty("--probability", alternative.probability);
    button.append(label, value);
    const index = this.selected;
    button.addEventListener("click", () => this.choose(index, alternative));
    item.append(button);
    return item;
  }

  /** Continues with another token than the one that was generated. */
  choose(index, { id, text, probability }) {
    const replaced = this.tokens[index];
    const blank = this.model.vocabulary === "word" && replaced.text.startsWith(" ") ? " " : "";
    const { alternatives } = replaced;
    this.chosen = [...this.tokens.slice(0, index), { id, text: blank + text, probability, alternatives }];
    this.generate();
  }

  /** Reads the typed text and what is shown after it into the state. Returns whether that worked. */
  async keep() {
    this.abort();
    const text = prefix.value;
    const shown = this.typed.textContent + this.continuation.textContent;
    if (this.status.classList.contains("error") || !shown) return false;
    const tokens = this.tokens.map((token) => token.id);
    try {
      await request(`${this.conversation}/generate`, { text, tokens, length: 0, keep: true, stream: false });
      this.keptText.textContent += shown;
      return true;
    } catch (error) {
      this.recover(error, this.controller.signal);
      return false;
    }
  }

  async reset() {
    this.abort();
    try {
      await request(`${this.conversation}/reset`);
      this.keptText.textContent = "";
    } catch (error) {
      this.recover(error, this.controller.signal);
    }
  }
}

function showRunning() {
  element("stop").disabled = !cards.some((card) => card.isRunning);
}

let timer;
/** Continues the text by all models, once nothing has changed for a moment. */
function regenerate(delay = DEBOUNCE_MS) {
  clearTimeout(timer);
  timer = setTimeout(() => cards.forEach((card) => card.generate()), delay);
}

function onTextChanged() {
  for (const card of cards) card.chosen = [];
  regenerate();
}

async function changeState(change) {
  clearTimeout(timer);
  if (prefix.value && cards.some((card) => card.typed.textContent !== card.separated(prefix.value))) {
    for (const card of cards) [card.typed.textContent, card.chosen] = [card.separated(prefix.value), []], card.clear();
  }
  const results = await Promise.all(cards.map(change));
  for (const card of cards) card.chosen = [];
  return results.some(Boolean);
}

async function keep() {
  const isKept = await changeState((card) => card.keep());
  prefix.focus();
  if (!isKept) return;
  prefix.value = "";
  regenerate(0);
}

async function reset() {
  await changeState((card) => card.reset());
  regenerate(0);
}

function stop() {
  clearTimeout(timer);
  for (const card of cards) {
    if (card.isRunning) card.say(`${card.tokens.length} tokens, stopped`);
    card.abort();
  }
}

function logIn(message = "") {
  element("main").hidden = true;
  element("login").hidden = false;
  element("login-error").textContent = message;
  element("token").focus();
}

async function start() {
  let models;
  try {
    models = await (await request("models", undefined, { method: "GET" })).json();
  } catch (error) {
    return logIn(sessionStorage.getItem("token") ? error.message : "");
  }
  element("login").hidden = true;
  element("main").hidden = false;
  element("summary").textContent = models.length === 1 ? models[0].name : `${models.length} models`;
  document.title = `${models[0].name} – lanes`;
  cards.splice(0, Infinity, ...models.map((model) => new Card(model)));
  element("models").replaceChildren(...cards.map((card) => card.root));
  await Promise.all(cards.map((card) => card.connect()));
  prefix.focus();
  regenerate(0);
}

element("options").open = matchMedia("(min-width: 52rem)").matches;
element("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", element("token").value);
  start();
});
prefix.addEventListener("input", onTextChanged);
for (const id of ["temperature", "top_k", "top_p", "length", "seed"]) {
  element(id).addEventListener("input", () => {
    showOptions();
    regenerate();
  });
}
element("resample").addEventListener("click", () => {
  element("seed").value = Math.floor(Math.random() * 1e9);
  for (const card of cards) card.chosen = [];
  regenerate(0);
});
element("keep").addEventListener("click", keep);
element("stop").addEventListener("click", stop);
element("reset").addEventListener("click", reset);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) keep();
  else if (event.key === "Escape") stop();
});
addEventListener("pagehide", () => {
  for (const card of cards) request(card.conversation, undefined, { method: "DELETE", keepalive: true }).catch(() => {});
});

showOptions();
start();
