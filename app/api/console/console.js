// The page: signs in, follows the stream, and hands each census to what draws. It keeps nothing but the theme.

import { Chart } from "/console/charts.js";
import { changes, Figures, short, verdict } from "/console/figures.js";
import { Picture, tiersOf } from "/console/picture.js";
import { follow } from "/console/stream.js";
import { Switchboard } from "/console/switchboard.js";

const MOST_TOLD = 40;
// Somebody who listens to the page is told of the cluster at most so often: a sentence takes its time.
const SPEAK_MS = 3000;
const ORDER = ["order.placed", "order.reserved", "order.confirmed", "order.invoiced"];
const ORDER_WORDS = { "order.placed": "placed", "order.reserved": "stock reserved", "order.confirmed": "paid and confirmed", "order.invoiced": "invoiced", "order.payment_pending": "waiting for the payment provider", "order.declined": "payment declined", "order.rejected": "rejected", "order.cancelled": "cancelled" };
const SIDE = ["order.payment_pending", "order.rejected", "order.cancelled"];
const STATE_WORDS = { ok: "well", warn: "struggles", bad: "gone", unknown: "nobody says" };

const find = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const figures = new Figures();
const picture = new Picture(find("picture"));
const switchboard = new Switchboard(find("switchboard"));
const milliseconds = (value) => (value >= 0.9995 ? `${value.toFixed(1)} s` : `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`);
const charts = {
  rate: new Chart(find("chart-rate"), { series: [{ name: "a", label: "all" }, { name: "c", label: "failing" }], least: 5, format: short }),
  latency: new Chart(find("chart-latency"), { series: [{ name: "c", label: "p99" }, { name: "b", label: "p95" }, { name: "a", label: "p50" }], least: 0.01, format: milliseconds }),
  hits: new Chart(find("chart-hits"), { series: [{ name: "a", label: "all" }, { name: "b", label: "in the process" }], least: 1, format: (value) => `${Math.round(value * 100)} %` }),
  queue: new Chart(find("chart-queue"), { series: [{ name: "a", label: "age" }], least: 1, format: (value) => `${value >= 9.95 ? Math.round(value) : value.toFixed(1)} s` }),
};
let model = null;
let sampled = 0;
let seen = new Set();
let unsaid = [];
let following = null;

function start() {
  following?.abort();
  following = new AbortController();
  follow({ census, instance, refused, state }, following.signal);
}

function census(told) {
  const now = figures.take(told);
  find("board").hidden = find("sign-out").hidden = false;
  find("sign-in").hidden = true;
  if (model) for (const change of changes(model, now)) tell(change);
  else tell({ state: "ok", text: "watching from now on" });
  model = now;
  const { state: how, text } = verdict(now);
  find("verdict").dataset.state = how;
  put(find("verdict-text"), text);
  picture.show(now);
  if (performance.now() - sampled > 950) {
    sampled = performance.now();
    charts.rate.add([now.rate, now.failing]);
    charts.latency.add([now.latency.p99, now.latency.p95, now.latency.p50]);
    charts.hits.add([now.hits, now.near]);
    charts.queue.add([now.oldest]);
  }
  showFunnel(now);
  showBreakers(now);
  showWords(now);
  for (const event of now.events) if (!seen.has(event.id)) list(find("events"), { at: event.at, state: event.event, text: `${event.event.replace(/^order\.|^profile\./, (start) => (start === "order." ? "order " : "profile "))} · …${event.subject}` });
  seen = new Set(now.events.map((event) => event.id));
}

function instance(told) {
  put(find("link"), `live from ${told.name}, ${told.region}`);
  switchboard.open(told.switchboard);
}

function state(how, why) {
  find("link").dataset.state = how;
  if (how === "lost") put(find("link"), why || "the stream broke off; connecting again …");
}

function refused(problem) {
  const strange = problem.status === 401;
  find("board").hidden = find("sign-out").hidden = true;
  find("sign-in").hidden = false;
  find("sign-in-hint").hidden = document.documentElement.dataset.local !== "yes";
  put(find("sign-in-why"), strange ? "" : problem.detail);
  put(find("verdict-text"), "Signed out");
  put(find("link"), "");
  find("verdict").dataset.state = "unknown";
  switchboard.open(null);
  model = null;
  find("sign-in").elements.email.focus();
}

function tell({ state: how, text }) {
  list(find("troubles"), { at: Date.now(), state: how, text });
  unsaid.push(text);
}

function list(where, { at, state: how, text }) {
  const item = document.createElement("li");
  item.dataset.state = how;
  const mark = document.createElement("span");
  mark.className = "mark";
  mark.ariaHidden = "true";
  const time = document.createElement("time");
  time.dateTime = new Date(at).toISOString();
  time.textContent = new Date(at).toLocaleTimeString([], { hour12: false });
  item.append(mark, time, " ", text);
  where.prepend(item);
  while (where.children.length > MOST_TOLD) where.lastChild.remove();
}

function showFunnel({ counts, window: seconds }) {
  put(find("funnel-window"), `of the last ${seconds >= 120 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds)} s`}`);
  const most = Math.max(1, counts["order.placed"] ?? 0);
  rows(find("funnel"), [...ORDER, ...SIDE], (event) => {
    const count = counts[event] ?? 0;
    return { key: event, words: [ORDER_WORDS[event], String(count), ORDER.includes(event) && event !== "order.placed" && counts["order.placed"] ? `${Math.round((count / most) * 100)} %` : ""], share: Math.min(1, count / most), side: SIDE.includes(event) };
  });
}

function rows(where, keys, of) {
  while (where.children.length < keys.length) {
    const item = document.createElement("li");
    item.append(...["bar", "word", "count", "share"].map((name) => Object.assign(document.createElement("span"), { className: name })));
    where.append(item);
  }
  keys.forEach((key, index) => {
    const { words, share, side } = of(key);
    const item = where.children[index];
    item.dataset.event = key;
    item.classList.toggle("side", side);
    const [bar, ...parts] = item.children;
    bar.style.setProperty("--share", share.toFixed(3));
    parts.forEach((part, place) => put(part, words[place]));
  });
}

function showBreakers({ breakers }) {
  const list_ = find("breakers");
  while (list_.children.length < breakers.length) list_.append(document.createElement("li"));
  while (list_.children.length > breakers.length) list_.lastChild.remove();
  breakers.forEach(({ name, open, of }, index) => {
    const item = list_.children[index];
    item.dataset.state = open ? "bad" : "ok";
    if (!item.children.length) item.append(...["mark", "name", "how"].map((className) => Object.assign(document.createElement("span"), { className })));
    put(item.children[1], name);
    put(item.children[2], open ? `open in ${open} of ${of} processes` : "closed");
  });
}

function showWords(now) {
  const rowsWanted = tiersOf(now).flat();
  const queue = now.waiting === null ? "no relay says" : `${now.waiting} waiting, the oldest ${now.oldest.toFixed(1)} s, ${now.letters} dead letters`;
  rowsWanted.push({ name: "Outbox", state: now.waiting === null ? "unknown" : now.letters || now.oldest > 10 ? "warn" : "ok", first: queue, second: "" });
  const body = find("words");
  while (body.rows.length < rowsWanted.length) {
    const row = body.insertRow();
    row.append(Object.assign(document.createElement("th"), { scope: "row" }), ...[1, 2, 3].map(() => document.createElement("td")));
  }
  while (body.rows.length > rowsWanted.length) body.deleteRow(-1);
  rowsWanted.forEach((node, index) => {
    const row = body.rows[index];
    row.dataset.id = node.id ?? "outbox";
    row.dataset.state = node.state;
    [node.name, STATE_WORDS[node.state], node.rate === undefined ? "" : short(node.rate), [node.first, node.second].filter(Boolean).join(", ")].forEach((words, place) => put(row.cells[place], words));
  });
}

/** Change a text only if it is another: a screen reader, and a selection, are not disturbed for nothing. */
function put(node, words) {
  if (node.textContent !== words) node.textContent = words;
}

find("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { email, password } = event.target.elements;
  try {
    const answer = await fetch("/api/v1/sessions", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ email: email.value, password: password.value }) });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    password.value = "";
    start();
  } catch (error) {
    put(find("sign-in-why"), error.message);
  }
});
find("fill-in").addEventListener("click", () => {
  const { email, password } = find("sign-in").elements;
  [email.value, password.value] = ["admin@example.com", "correct horse battery"];
});
find("sign-out").addEventListener("click", async () => {
  following.abort();
  await fetch("/api/v1/sessions/current", { method: "DELETE" }).catch(() => null);
  refused({ status: 401 });
});
find("theme").addEventListener("click", () => {
  const dark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
});
find("pause").addEventListener("click", () => move(find("pause").getAttribute("aria-pressed") === "true"));
still.addEventListener("change", () => move(!still.matches));
setInterval(() => {
  if (unsaid.length) put(find("spoken"), unsaid.splice(0).slice(-3).join(". "));
}, SPEAK_MS);

function move(moving) {
  find("pause").setAttribute("aria-pressed", String(!moving));
  picture.move(moving);
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
move(!still.matches);
// The page says whether it was asked for with a session: a refusal that can be foreseen is not asked for.
if (document.documentElement.dataset.signedIn === "yes") start();
else refused({ status: 401 });
