// Main: keeps the state, asks the server, and shows what it answers.

import { theme } from "./colours.js";
import { drawAll, drawMarks, noteOf } from "./draw.js";
import { find, make, swatch } from "./elements.js";
import { Editor } from "./editor.js";
import { Hands } from "./hands.js";
import { Layout } from "./layout.js";
import { numbersOf } from "./numbers.js";
import { computes } from "./orders.js";
import { CanvasPen } from "./pens.js";
import { Picture } from "./picture.js";
import { saveButtons } from "./save.js";
import { DEFAULTS, FIELDS, fromAddress, limitBytes, ownOrder, question, toAddress } from "./state.js";
import { timeText } from "./units.js";

const TEXTS = ["schedule", "ranks", "microbatches", "stages", "second", "secondStages", "forward", "input", "weight", "full",
  "activations", "kept", "message", "latency", "bandwidth", "limit", "recompute", "offload", "hostBandwidth",
  "replicas", "parameters", "ring", "whole", "colours"];
const CHECKS = ["path", "memory", "messages", "overlay"];

const page = {
  state: { ...DEFAULTS },
  choices: null,
  first: null, second: null, run: null, // the last answers
  order: "", // the text of the first timeline: as it was given, with all communication that it states
  layout: null,
  hover: null, pinned: null,
};
const asked = new Map(); // question -> answer; the last few, so that going back is at once
let turn = 0; // of the latest question
let address = null; // as last written

/** Ask the server; answers of the last questions are kept. */
async function ask(given) {
  const key = JSON.stringify(given);
  if (!asked.has(key)) {
    const response = await fetch("step", { method: "POST", headers: { "Content-Type": "application/json" }, body: key });
    const answer = await response.json();
    if (answer.picture) answer.picture = new Picture(answer.picture);
    asked.set(key, answer);
    if (asked.size > 40) asked.delete(asked.keys().next().value);
  }
  return asked.get(key);
}

async function askRun(number) {
  if (page.run?.run === number) return page.run;
  const response = await fetch(`run?number=${encodeURIComponent(number)}`);
  const answer = await response.json();
  if (answer.picture) answer.picture = new Picture(answer.picture);
  return { run: number, ...answer };
}

/** Change the state, and with it the page and its address. `keep`: the address takes the place of the last one. */
async function change(patch, { keep = false } = {}) {
  const began = performance.now();
  page.state = { ...page.state, ...patch };
  fillForm();
  const mine = (turn += 1);
  find("timeline").ariaBusy = "true";
  const { state } = page;
  const written = writeAddress(state, keep, mine);
  const failed = (fault) => ({ error: fault instanceof TypeError && /fetch/i.test(fault.message) ? "the server does not answer: start ppsim explore again" : `this is a fault of the page, please report it (${fault.stack ?? fault})` });
  const [first, second, run] = await Promise.all([
    ask(question(state)).catch(failed),
    state.second ? ask(question(state, true)).catch(failed) : null,
    state.run ? askRun(state.run).catch(failed) : null,
  ]);
  await written;
  if (mine !== turn) return;
  // An order of one's own says itself how many ranks and microbatches there are, also for what it is compared with.
  const own = state.csv && first.picture ? { ranks: String(first.picture.ranks), microbatches: String(first.picture.microbatches) } : {};
  if (Object.keys(own).some((name) => own[name] !== state[name])) {
    await change(own, { keep: true });
    return;
  }
  const copies = state.csv ? Number(state.copies || 1) : (first.picture?.copies ?? 1);
  Object.assign(page, { first, second, run, copies, order: state.csv || (first.picture?.csv ?? "") });
  page.hover = null;
  show();
  Object.assign(find("timeline").dataset, { took: Math.round(performance.now() - began) });
  find("timeline").ariaBusy = "false";
}

async function writeAddress(state, keep, mine) {
  const next = await toAddress(state);
  if (mine !== turn || next === address) return;
  if (keep || address === null) history.replaceState(null, "", next);
  else history.pushState(null, "", next);
  address = next;
}

function fillForm() {
  const { state } = page;
  for (const id of TEXTS) {
    if (document.activeElement !== find(id) || find(id).tagName === "SELECT") find(id).value = state[id];
  }
  for (const id of CHECKS) find(id).checked = state[id];
  if (state.csv) find("schedule").value = "own";
  for (const id of ["ranks", "microbatches", "stages", "recompute", "offload", "whole"]) find(id).disabled = Boolean(state.csv);
  find("own-drop").hidden = !state.csv;
  find("secondStages").disabled = !state.second;
}

/** Show the last answers. */
function show() {
  showProblems();
  showViews();
  draw();
  page.editor.show(page);
  showRun();
  const natural = page.choices.schedules;
  find("stages").placeholder = String(natural[page.state.schedule] ?? "");
  find("secondStages").placeholder = String(natural[page.state.second] ?? "");
}

const titleOf = (state) => (state.csv ? "your order" : state.schedule);

function showViews() {
  const { state, first, second, run } = page;
  const views = [];
  if (first?.picture) {
    const isBad = Boolean(first.problems);
    const view = { key: "first", title: isBad ? `${titleOf(state)} cannot run` : titleOf(state), tracks: [first.picture], isBad, editable: true };
    if (isBad) Object.assign(view, badRows(first));
    if (run?.picture && overlays()) view.tracks.push(run.picture);
    views.push(view);
  }
  if (second?.picture) views.push({ key: "second", title: state.second, tracks: [second.picture] });
  if (run?.picture && !overlays()) views.push({ key: "run", title: `${run.picture.clock}: ${run.name}`, tracks: [run.picture] });
  for (const view of views) {
    view.note = view.tracks.length > 1
      ? `above ${noteOf(view.tracks[0])}; below, ${view.tracks[1].clock}, ${noteOf(view.tracks[1])}`
      : noteOf(view.tracks[0]);
  }
  page.views = views;
  const rows = views.map((view) => ({ title: view.title, picture: view.tracks[0] }));
  if (run?.picture && overlays()) rows.splice(1, 0, { title: `${run.picture.clock}: ${run.name}`, picture: run.picture });
  find("numbers").replaceChildren(...numbersOf(rows, limitBytes(state), page.choices));
  const main = document.querySelector("main");
  main.classList.toggle("stale", Boolean(first?.error) && views.length > 0);
  find("status").textContent = rows.map((row) => `${row.title} ${timeText(row.picture.numbers.makespan)}`).join(", ");
}

/** Whether the measured run is drawn in the lanes of the first timeline: if it has the same orders. */
function overlays() {
  const { first, run, state } = page;
  return state.overlay && !first?.problems && first?.picture && run?.picture && run.picture.csv === first.picture.csv;
}

/** The rows that problems concern. Problems name cells of the text, some of which may be empty or communication. */
function badRows({ problems, picture }) {
  const places = page.state.csv.split("\n").map((line) => {
    let count = 0;
    return line.split(",").map((cell) => (computes(cell) ? count++ : -1));
  });
  const found = problems.map((problem) => ({
    ...problem,
    rows: problem.places.flatMap(([row, column]) => {
      const place = places[row - 1]?.[column - 1] ?? -1;
      const first = picture.lanes[row - 1]?.[0];
      return place < 0 || first === undefined ? [] : picture.rowsOf[picture.rows.action[first] + place] ?? [];
    }),
  }));
  return { problems: found, badRows: new Set(found.flatMap((each) => each.rows)) };
}

function showProblems() {
  const { first, second, run, state } = page;
  const items = [];
  for (const id of new Set(Object.values(FIELDS))) find(id)?.removeAttribute("aria-invalid");
  const complain = (answer, title, isSecond) => {
    if (!answer?.error) return;
    let field = FIELDS[answer.field];
    if (isSecond && field === "schedule") field = "second";
    if (isSecond && field === "stages") field = "secondStages";
    if (field && find(field)) find(field).setAttribute("aria-invalid", "true");
    const word = field && find(field)?.closest("label")?.firstChild?.textContent?.trim();
    const text = answer.field && word ? answer.error.replace(answer.field, word) : answer.error;
    items.push(problemItem(title ? `${title}: ${text}` : text, () => field && find(field)?.focus()));
  };
  complain(first, "", false);
  complain(second, second && first && !first.error ? state.second : "", true);
  complain(run, "", false);
  let heading = items.length ? "This cannot be shown" : "";
  if (first?.problems) {
    const count = first.problems.length;
    heading = `This order cannot run: ${count === 1 ? "one problem" : `${count} problems`}`;
    find("csv").setAttribute("aria-invalid", "true");
    for (const problem of first.problems.slice(0, 200)) {
      items.push(problemItem(problem.message, () => page.editor.goTo(problem.places[0])));
    }
  }
  const section = find("problems");
  section.hidden = !items.length;
  const texts = items.map((each) => each.textContent);
  const unique = items.filter((each, index) => texts.indexOf(each.textContent) === index);
  section.replaceChildren(make("h2", {}, heading), make("ul", {}, ...unique));
}

function problemItem(text, onclick) {
  return make("li", {}, make("button", { type: "button", onclick }, text));
}

function showRun() {
  const { run, state, first } = page;
  const isHere = Boolean(run?.picture);
  find("run-name").textContent = isHere
    ? `${run.name}: ${timeText(run.picture.numbers.makespan)}, ${run.picture.ranks} ranks, ${run.picture.microbatches} microbatches.`
    : "A trace file that ppexec run --out wrote. Drop it on the page, or";
  find("run-use").hidden = !isHere;
  find("run-drop").hidden = !state.run;
  find("overlay").parentElement.hidden = !isHere || !first?.picture || run.picture.csv !== first.picture.csv;
  const comparison = find("comparison");
  comparison.hidden = !(isHere && first?.comparison);
  comparison.textContent = first?.comparison ?? "";
}

function showLegend(views) {
  const entries = [];
  const { choices, state } = page;
  const kinds = new Set(views.flatMap((view) => view.tracks.flatMap((picture) => [...new Set(picture.rows.kind)])));
  choices.kinds.forEach((kind, index) => {
    if (kinds.has(index)) entries.push(make("span", {}, swatch(kind.colour), kind.name));
  });
  if (state.colours === "microbatch") {
    const gradient = make("span", { class: "gradient" });
    gradient.style.background = "linear-gradient(90deg, #440154, #31688e, #35b779, #fde725)";
    entries.unshift(make("span", {}, "microbatch, first", gradient, "to last; the lower edge is"));
  }
  const colours = theme();
  entries.push(make("span", {}, swatch(colours.idle), "idle"));
  if (state.memory) entries.push(make("span", {}, swatch(colours.strip), "activations held"));
  if (state.memory && limitBytes(state) !== null) entries.push(make("span", {}, swatch(colours.over), "over the limit"));
  const beside = new Set(views.flatMap((view) => view.tracks.flatMap((picture) => picture.beside?.kind ?? [])));
  for (const [kind, { name, colour }] of Object.entries(choices.beside)) {
    if (beside.has(kind)) entries.push(make("span", {}, swatch(colour), name));
  }
  if (state.path) entries.push(make("span", {}, swatch(choices.critical), "critical path"));
  if (views.some((view) => view.tracks.some((each) => each.chunks > 1)) && state.colours === "kind") entries.push("later stages of a rank are lighter");
  find("legend").replaceChildren(...entries);
}

function canvasPen(id, width, height) {
  const canvas = find(id);
  const scale = Math.min(window.devicePixelRatio || 1, 16000 / Math.max(height, 1));
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return new CanvasPen(context);
}

function layoutFor(width) {
  const { state } = page;
  const number = (text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : null);
  let [from, to] = [number(state.from), number(state.to)];
  if (!(to > (from ?? 0))) [from, to] = [null, null];
  return new Layout(page.views, { width, from, to, strips: state.memory });
}

/** Draw what does not follow the pointer. */
function draw() {
  if (!page.views) return;
  const width = find("timeline").clientWidth;
  page.layout = layoutFor(width);
  const pen = canvasPen("picture", width, page.layout.height);
  drawAll(pen, page.layout, { theme: theme(), choices: page.choices, state: page.state, limit: limitBytes(page.state) });
  showLegend(page.views);
  readPin();
  drawMarked();
}

/** Draw what is marked, and what is being dragged. */
function drawMarked(extra) {
  const { layout } = page;
  const pen = canvasPen("marks", layout.width, layout.height);
  drawMarks(pen, layout, page.hover ?? page.pinned, theme());
  extra?.(pen);
}

/** The marked action or idle span, as the address has it: "first:0:12", or "first:0:i3" for an idle span. */
function readPin() {
  const [key, track, number] = page.state.at.split(":");
  page.pinned = null;
  const block = page.layout.blocks.find((each) => each.key === key);
  const picture = block?.tracks[Number(track)];
  if (!picture || !number) return;
  const isIdle = number.startsWith("i");
  const index = Number(isIdle ? number.slice(1) : number);
  if (!(index >= 0 && index < (isIdle ? picture.idle?.rank.length ?? 0 : picture.count))) return;
  const rank = isIdle ? picture.idle.rank[index] : picture.rows.rank[index];
  page.pinned = { block, track: Number(track), picture, rank, row: isIdle ? -1 : index, idle: isIdle ? index : -1 };
}

async function addRun(file) {
  const response = await fetch(`run?name=${encodeURIComponent(file.name)}`, {
    method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file,
  });
  const answer = await response.json();
  if (answer.picture) answer.picture = new Picture(answer.picture);
  page.run = answer;
  if (answer.error) {
    showProblems();
    find("timeline").ariaBusy = "false";
  } else await change({ run: answer.run });
}

/** Take in a file: a measured run, or an order. */
async function addFile(file) {
  if (!file) return;
  find("timeline").ariaBusy = "true";
  const head = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  if (head[0] === 0x50 && head[1] === 0x4b) await addRun(file); // a zip: a saved trace
  else if (file.size > 2 ** 21) {
    page.first = { error: `${file.name} is too large for an order: at most 2 MiB` };
    showProblems();
    find("timeline").ariaBusy = "false";
  } else {
    find("text").open = true;
    await change({ ...ownOrder(await file.text(), 1), at: "" });
  }
}

function takeRun() {
  const { order, usual, picture } = page.run;
  const text = (seconds) => seconds?.map((each) => String(Number((each * 1e3).toPrecision(6)))).join(", ");
  const patch = { ...ownOrder(order, picture.copies), at: "", forward: text(usual.F) };
  if (usual.I && usual.W) Object.assign(patch, { input: text(usual.I), weight: text(usual.W) });
  if (usual.B) patch.full = text(usual.B);
  change(patch);
}

function listen() {
  for (const id of TEXTS) {
    const control = find(id);
    if (control.tagName === "SELECT") {
      control.addEventListener("change", () => {
        if (id !== "schedule") return change({ [id]: control.value, ...(id === "second" ? { secondStages: "" } : {}) });
        if (control.value !== "own") return change({ schedule: control.value, ...ownOrder("", 1), stages: "", at: "", from: "", to: "" });
        return change(ownOrder(page.order, page.copies));
      });
    } else {
      control.addEventListener("input", () => change({ [id]: control.value }, { keep: true }));
    }
  }
  for (const id of CHECKS) find(id).addEventListener("change", () => change({ [id]: find(id).checked }));
  find("settings-toggle").addEventListener("click", () => {
    const isOpen = find("settings").classList.toggle("open");
    find("settings-toggle").setAttribute("aria-expanded", String(isOpen));
  });
  find("settings").addEventListener("submit", (event) => event.preventDefault());
  find("run-file").addEventListener("change", (event) => addFile(event.target.files[0]));
  find("run-use").addEventListener("click", takeRun);
  find("run-drop").addEventListener("click", () => change({ run: "" }));
  find("own-drop").addEventListener("click", () => change({ ...ownOrder("", 1), at: "" }));
  window.addEventListener("popstate", async () => {
    address = location.hash || "#";
    page.state = await fromAddress(location.hash);
    await change({}, { keep: true });
  });
  window.addEventListener("resize", () => draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  let depth = 0;
  const hold = (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault();
  window.addEventListener("dragenter", (event) => { hold(event); depth += 1; find("drop").hidden = false; });
  window.addEventListener("dragover", hold);
  window.addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) find("drop").hidden = true; });
  window.addEventListener("drop", (event) => {
    hold(event);
    depth = 0;
    find("drop").hidden = true;
    addFile(event.dataTransfer?.files[0]);
  });
}

async function start() {
  page.choices = await (await fetch("choices")).json();
  const names = Object.keys(page.choices.schedules);
  const option = (value, text = value) => make("option", { value }, text);
  find("schedule").append(...names.map((name) => option(name)), option("own", "an order of your own"));
  find("second").append(option("", "nothing"), ...names.map((name) => option(name)));
  page.state = await fromAddress(location.hash);
  address = null;
  Object.assign(page, { change, ask, draw, drawMarked, layoutFor });
  page.editor = new Editor(page);
  page.hands = new Hands(page);
  saveButtons(page);
  listen();
  await change({}, { keep: true });
}

start();
