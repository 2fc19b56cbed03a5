"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const { runs } = report;
const byId = (id) => document.getElementById(id);
const isTouch = matchMedia("(pointer: coarse)").matches;
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const COLORS = {
  light: ["#1f5fb0", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#946200", "#4b5563"],
  dark: ["#7ab0ff", "#ff9a5c", "#6bd48a", "#b9a1ff", "#ff8ac0", "#57d0e6", "#e6bd4f", "#b4bac6"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const AXES = { step: "Step", tokens: "Tokens", time: "Time" };
const PLOTS = [
  { name: "training", title: "Training perplexity", unit: "perplexity", log: true },
  { name: "validation", title: "Validation perplexity", unit: "perplexity", log: true },
  { name: "learning_rate", title: "Learning rate", unit: "learning rate" },
  { name: "tokens_per_second", title: "Tokens per second", unit: "tokens/s" },
].filter(({ name }) => runs.some((run) => run.curves[name]));
const view = { axis: "step", hidden: new Set(), text: runs.findIndex((run) => run.text), samples: 0, kind: null };
const unified = runs.length <= 6; // one box with the values of all runs, or that of the nearest curve
let isLinking = false;

// --- elements and numbers ---

/** Makes an element; all text becomes text nodes, so nothing of a run is ever parsed as HTML. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "onclick" || name === "onchange") made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function formatNumber(value) {
  if (value >= 1e6) return value.toPrecision(3);
  const digits = Math.abs(value) < 1 ? { maximumSignificantDigits: 4 } : { maximumFractionDigits: value < 100 ? 3 : 1 };
  return value.toLocaleString("en", digits);
}

/** Four digits, so that scores below each other can be compared. */
const formatScore = (value) => value >= 1e6 ? value.toPrecision(4) : value.toLocaleString("en", { minimumSignificantDigits: 4, maximumSignificantDigits: 4 });
const formatCount = (value) => value.toLocaleString("en");

function formatTime(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  const two = (value) => String(value).padStart(2, "0");
  const rest = two(Math.round(seconds % 60) % 60);
  return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${rest}`;
}

const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
const isDark = () => (document.documentElement.dataset.theme ?? (darkScheme.matches ? "dark" : "light")) === "dark";
const colorOf = (index) => COLORS[isDark() ? "dark" : "light"][index % COLORS.dark.length];
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
/** Plotly reads a few tags in text, and replaces %{…} in hover boxes. */
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/%/g, "&#37;");

function choice(options, selected, onSelect) {
  return Object.entries(options).map(([value, label]) =>
    element("button", { type: "button", "aria-pressed": value === selected, onclick: () => onSelect(value) }, label));
}

function runMenu(label, indices, selected, onSelect) {
  if (indices.length < 2) return null;
  const options = indices.map((index) => element("option", { value: index }, runs[index].name));
  const menu = element("select", { "aria-label": label, onchange: () => onSelect(Number(menu.value)) }, ...options);
  menu.value = selected;
  return menu;
}

// --- figures ---

const FIGURES = [
  { key: "perplexity", label: "Training perplexity", format: formatScore, isScore: true },
  { key: "validation_perplexity", label: "Validation perplexity", format: formatScore, isScore: true },
  { key: "best_validation_perplexity", label: "Best validation", format: formatScore, isScore: true },
  { key: "validation_bits_per_character", label: "Bits per character", format: formatScore, isScore: true },
  { key: "steps", label: "Steps", format: formatCount },
  { key: "epochs", label: "Epochs", format: formatCount },
  { key: "tokens", label: "Tokens", format: formatCount },
  { key: "seconds", label: "Training time", format: formatTime },
  { key: "workers", label: "Workers", format: formatCount },
  { key: "restarts", label: "Restarts", format: formatCount },
];
const isKnown = (value) => value !== null && value !== undefined;

function showFigures() {
  const known = FIGURES.filter(({ key }) => runs.some((run) => isKnown(run.figures[key])));
  byId("figures").append(runs.length > 1 ? figureTable(known) : figureTiles(known));
}

function figureTiles(known) {
  const tiles = known.map(({ key, label, format }) =>
    element("div", { class: "card" }, element("dt", {}, label), element("dd", {}, format(runs[0].figures[key]))));
  return element("dl", { class: "tiles" }, ...tiles);
}

function figureTable(known) {
  const scores = known.filter(({ isScore }) => isScore);
  const best = Object.fromEntries(scores.map(({ key }) =>
    [key, Math.min(...runs.map((run) => run.figures[key]).filter(isKnown))]));
  const others = known.filter(({ isScore }) => !isScore);
  const labels = (figures) => figures.map(({ label }) => [label, null]);
  const head = [["Run", null], ["State", "text"], ...labels(scores), ...report.differences.map((name) => [name, "text"]), ...labels(others)];
  const cells = (run, figures) => figures.map(({ key, format }) => {
    const value = run.figures[key];
    return element("td", { class: isKnown(value) && value === best[key] ? "best" : null }, isKnown(value) ? format(value) : "–");
  });
  const body = runs.map((run, index) => element("tr", {},
    element("th", { scope: "row" }, element("span", { class: "dot", "data-run": index }), " ", run.name),
    element("td", { class: "text" }, run.figures.trial_state ?? run.state),
    ...cells(run, scores),
    ...report.differences.map((name) => element("td", { class: "text" }, run.config[name].text)),
    ...cells(run, others)));
  const columns = head.map(([label, kind]) => element("th", { scope: "col", class: kind }, label));
  return element("div", { class: "scroll", tabindex: 0 },
    element("table", {}, element("thead", {}, element("tr", {}, ...columns)), element("tbody", {}, ...body)));
}

// --- curves ---

function showCurves() {
  byId("axis").replaceChildren(...choice(AXES, view.axis, (axis) => { view.axis = axis; showCurves(); drawPlots(); }));
  if (runs.length > 1) byId("legend").replaceChildren(...runs.map(legendButton));
  const events = runs.flatMap((run) => run.events);
  const parts = [
    isTouch ? "Tap a curve for its values; the buttons above a plot zoom." : "Drag to zoom all plots, double-click to reset.",
    events.some(({ kind }) => kind === "restart") ? "▼ marks a restart." : "",
    events.some(({ kind }) => kind === "resize") ? "◆ marks a change of the number of workers." : "",
    runs.some((run) => run.curves.validation) ? "" : "No validation text: set corpus.validation_fraction to have a validation curve.",
  ];
  byId("events").textContent = parts.filter(Boolean).join(" ");
  paintDots();
}

function legendButton(run, index) {
  const toggle = () => {
    if (!view.hidden.delete(index)) view.hidden.add(index);
    showCurves();
    drawPlots();
  };
  return element("button", { type: "button", "aria-pressed": !view.hidden.has(index), onclick: toggle },
    element("span", { class: "dot", "data-run": index }), run.name);
}

function paintDots() {
  for (const dot of document.querySelectorAll(".dot")) dot.style.setProperty("--run", colorOf(Number(dot.dataset.run)));
}

function tracesOf(plot) {
  return runs.flatMap((run, index) => {
    const curve = run.curves[plot.name];
    if (!curve || view.hidden.has(index)) return [];
    const color = colorOf(index);
    const notes = plot.name === "training" ? eventNotes(run, curve) : {};
    const step = unified && view.axis === "step" ? "" : "step %{customdata[0]:,}, ";
    const line = {
      x: curve[view.axis], y: curve.value, customdata: curve.step.map((value, point) => [value, notes[point] ?? ""]), name: plain(run.name), type: "scatter",
      mode: curve.value.length < 40 ? "lines+markers" : "lines", marker: { size: 5 },
      line: { color, width: 1.75, dash: DASHES[Math.floor(index / COLORS.dark.length) % DASHES.length] },
      hovertemplate: `${step}${plot.unit} %{y:.5~g}%{customdata[1]}<extra>${runs.length > 1 ? plain(run.name) : ""}</extra>`,
    };
    return plot.name === "training" && run.events.length ? [line, eventTrace(run, curve, color)] : [line];
  });
}

const pointBefore = (curve, event) => Math.max(0, curve.step.findLastIndex((step) => step <= event.step));

/** What happened at a point of a curve, by the point's index. */
function eventNotes(run, curve) {
  return Object.fromEntries(run.events.map((event) =>
    [pointBefore(curve, event), `<br>${plain(event.text)} before step ${formatCount(event.step)}`]));
}

function eventTrace(run, curve, color) {
  return {
    x: run.events.map((event) => event[view.axis]), y: run.events.map((event) => curve.value[pointBefore(curve, event)]),
    type: "scatter", mode: "markers", hoverinfo: "skip",
    marker: {
      color, size: 11, line: { color: styleOf("--surface"), width: 1.5 },
      symbol: run.events.map(({ kind }) => (kind === "restart" ? "triangle-down" : "diamond")),
    },
  };
}

function layoutOf(plot) {
  const line = styleOf("--line");
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, tickfont: { color: styleOf("--muted"), size: 11 } };
  const time = view.axis === "time";
  return {
    margin: { l: 44, r: 8, t: isTouch ? 32 : 8, b: 36 }, showlegend: false, paper_bgcolor: styleOf("--surface"), plot_bgcolor: styleOf("--surface"),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: styleOf("--ink") },
    hovermode: unified ? "x unified" : "closest", hoverdistance: 40,
    hoverlabel: { bgcolor: styleOf("--surface"), bordercolor: line, font: { color: styleOf("--ink") } },
    dragmode: isTouch ? false : "zoom", shapes: shapesOf(),
    modebar: { bgcolor: "rgba(0,0,0,0)", color: styleOf("--muted"), activecolor: styleOf("--accent") },
    xaxis: { ...axis, spikecolor: styleOf("--muted"), spikethickness: 1, title: { text: time ? "seconds" : view.axis, font: { size: 11, color: styleOf("--muted") }, standoff: 4 }, nticks: 6, hoverformat: time ? ",.1f" : ",d",
      unifiedhovertitle: { text: `<b>${time ? "%{x} seconds" : `${view.axis} %{x}`}</b>` } },
    yaxis: { ...axis, type: plot.log ? "log" : "linear", nticks: 6, rangemode: plot.log ? "normal" : "tozero", ...(plot.log ? { tickformat: "~g", dtick: logTick(plot) } : {}) },
    uirevision: view.axis,
  };
}

/** Ticks at powers of ten, at 1, 2 and 5 times these, or as plotly.js chooses them, by the range of the values. */
function logTick(plot) {
  const values = runs.flatMap((run) => run.curves[plot.name]?.value ?? []);
  const [low, high] = values.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, 0]);
  return high > 1000 * low ? 1 : high > 4 * low ? "D2" : null;
}

/** A line across a plot for each restart and change of the number of workers; only of a single run, or it is a fence. */
function shapesOf() {
  return runs.length > 1 ? [] : runs[0].events.map((event) => ({
    type: "line", yref: "paper", y0: 0, y1: 1, x0: event[view.axis], x1: event[view.axis],
    line: { color: styleOf("--muted"), width: 1, dash: "dot" },
  }));
}

async function drawPlots() {
  for (const plot of PLOTS) {
    await Plotly.react(`plot-${plot.name}`, tracesOf(plot), layoutOf(plot), {
      responsive: true, displaylogo: false, displayModeBar: isTouch ? true : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    });
  }
}

/** Gives all plots the horizontal range that the user chose in one. */
async function linkRanges(source, change) {
  if (isLinking) return;
  const range = change["xaxis.range[0]"] === undefined ? change["xaxis.range"] : [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  if (!range && !change["xaxis.autorange"]) return;
  isLinking = true;
  for (const plot of PLOTS) {
    if (plot !== source) await Plotly.relayout(`plot-${plot.name}`, range ? { "xaxis.range": range } : { "xaxis.autorange": true });
  }
  isLinking = false;
}

/** Runs plotly.js, which the page contains compressed; the policy allows this script by its digest. */
async function loadLibrary() {
  const packed = atob(byId("library").textContent);
  const bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index += 1) bytes[index] = packed.charCodeAt(index);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const textContent = await new Response(stream).text();
  document.head.append(Object.assign(document.createElement("script"), { textContent }));
}

async function startCurves() {
  byId("plots").append(...PLOTS.map(({ name, title }) =>
    element("div", { class: "card" }, element("h3", {}, title), element("div", { class: "plot", id: `plot-${name}` }))));
  showCurves();
  try {
    await loadLibrary();
    await drawPlots();
    for (const plot of PLOTS) byId(`plot-${plot.name}`).on("plotly_relayout", (change) => linkRanges(plot, change));
  } catch (error) {
    byId("plots").replaceChildren(element("p", { class: "empty" }, `The curves cannot be drawn in this browser: ${error.message}`));
  }
  document.documentElement.dataset.drawn = performance.now().toFixed(0);
}

// --- the losses of the validation text ---

function showText() {
  const section = byId("text");
  const run = runs[view.text];
  section.querySelector(".controls")?.remove();
  section.querySelector(".body")?.remove();
  const indices = runs.map((_, index) => index).filter((index) => runs[index].text);
  const menu = runMenu("Run whose losses are shown", indices, view.text, (index) => { view.text = index; showText(); });
  if (menu) section.querySelector(".bar").append(element("div", { class: "controls" }, menu));
  if (!run || run.text.reason) {
    section.append(element("p", { class: "empty body" }, run ? run.text.reason : "No losses were computed."));
    return;
  }
  // One scale for all runs, which one that has diverged does not set.
  const ends = runs.filter(({ text }) => text?.tokens?.length).map(({ text }) => quantile(text.tokens.map(([, nats]) => nats), 0.98));
  const limit = Math.max(quantile(ends, 0.5), 0.1);
  const tokens = run.text.tokens.map(([text, nats], index) => element("span",
    { "--share": Math.min(nats / limit, 1).toFixed(3), "data-token": index, class: text === "\n" ? "break" : null },
    text === "\n" ? "↵\n" : text));
  const prose = element("div", { class: "prose", id: "losses", tabindex: 0, role: "group", "aria-label": "Validation text; arrow keys move between its tokens" }, ...tokens);
  section.append(element("div", { class: "card body" }, prose,
    element("div", { class: "scale" }, "0", element("i"), `${formatNumber(limit)} nats or more`, element("span", {}, `· step ${formatCount(run.text.step)}`))));
  watchTokens(prose, run.text.tokens);
}

function watchTokens(prose, tokens) {
  let chosen = null;
  const choose = (span) => {
    chosen?.classList.remove("chosen");
    chosen = span;
    chosen?.classList.add("chosen");
    if (span) showTooltip(span, tokens[Number(span.dataset.token)]);
    else byId("tooltip").hidden = true;
  };
  prose.addEventListener("pointerover", (event) => choose(event.target.closest("[data-token]")));
  prose.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") choose(null); });
  prose.addEventListener("blur", () => choose(null));
  prose.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Escape: 0 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    choose(move ? prose.children[(chosen ? Number(chosen.dataset.token) : -1) + move] ?? chosen : null);
  });
  document.addEventListener("pointerdown", (event) => { if (!prose.contains(event.target)) choose(null); });
}

function quantile(values, share) {
  return values.sort((a, b) => a - b)[Math.floor(share * (values.length - 1))];
}

function showTooltip(span, [text, nats, alternatives]) {
  const tooltip = byId("tooltip");
  const percent = (share) => `${(100 * share).toLocaleString("en", { maximumSignificantDigits: 3 })}%`;
  const name = text.length > 1 && text.endsWith(" ") ? text.slice(0, -1) : text;
  tooltip.replaceChildren(
    element("b", {}, visible(name)), ` ${percent(Math.exp(-nats))}, ${formatNumber(nats)} nats`,
    element("table", {}, ...alternatives.map(([other, share]) => element("tr", { class: other === name ? "target" : null },
      element("td", {}, visible(other)), element("td", {}, percent(share))))));
  tooltip.hidden = false;
  const place = span.getClientRects()[0];
  const left = Math.min(place.left, document.documentElement.clientWidth - tooltip.offsetWidth - 12);
  const below = place.bottom + tooltip.offsetHeight + 16 < innerHeight;
  tooltip.style.left = `${scrollX + Math.max(12, left)}px`;
  tooltip.style.top = `${scrollY + (below ? place.bottom + 8 : place.top - tooltip.offsetHeight - 8)}px`;
}

// --- samples and configuration ---

function showSamples() {
  const section = byId("samples");
  section.querySelector(".controls")?.remove();
  section.querySelector(".body")?.remove();
  const { samples } = runs[view.samples];
  const kinds = Object.fromEntries(samples.map(({ kind }) => [kind, kind]));
  if (!(view.kind in kinds)) view.kind = Object.keys(kinds)[0];
  const menu = runMenu("Run whose samples are shown", [...runs.keys()], view.samples, (index) => { view.samples = index; showSamples(); });
  const tabs = element("div", { class: "choice" }, ...choice(kinds, view.kind, (kind) => { view.kind = kind; showSamples(); }));
  section.querySelector(".bar").append(element("div", { class: "controls" }, Object.keys(kinds).length > 1 ? tabs : null, menu));
  const cards = samples.filter(({ kind }) => kind === view.kind).map((sample) => element("div", { class: "card sample" },
    element("h3", {}, "step ", element("b", {}, formatCount(sample.step)), isKnown(sample.epoch) ? ` · epoch ${formatCount(sample.epoch)}` : "", ` · ${sample.kind}`),
    element("div", { class: "prose" }, element("mark", {}, sample.prefix), sample.continuation)));
  const empty = element("p", { class: "empty" }, "No samples yet: a run writes one at its end, and during training as train.sample_every sets.");
  section.append(element("div", { class: "body" }, ...(cards.length ? cards : [empty])));
}

function showConfig() {
  for (const run of runs) {
    const changed = Object.entries(run.config).filter(([, value]) => !value.default);
    const rows = (values) => element("table", {}, ...values.map(([name, { text }]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", { class: "text" }, text))));
    const table = changed.length ? element("div", { class: "scroll" }, rows(changed)) : element("p", { class: "empty" }, "All settings have their defaults.");
    const rest = Object.entries(run.config).filter(([, value]) => value.default);
    byId("config").append(element("details", runs.length === 1 ? { open: "" } : {},
      element("summary", {}, `${runs.length > 1 ? `${run.name}: ` : ""}${changed.length} settings that are not the defaults · ${run.folder}`), table,
      element("details", {}, element("summary", {}, `${rest.length} defaults`), element("div", { class: "scroll" }, rows(rest)))));
  }
}

// --- the page ---

function startTheme() {
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("lanes-theme") ?? theme; } catch { /* storage may be forbidden */ }
  const apply = (redraw) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
    paintDots();
    if (redraw && window.Plotly) drawPlots();
  };
  byId("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("lanes-theme", theme); } catch { /* as above */ }
    apply(true);
  });
  darkScheme.addEventListener("change", () => apply(true));
  apply(false);
}

const states = runs.length === 1 ? runs[0].state : `${runs.length} runs`;
byId("subtitle").textContent = `${states} · written ${new Date(1000 * report.time).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" })}`;
showFigures();
showText();
showSamples();
showConfig();
startTheme();
startCurves();
