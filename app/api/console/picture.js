// The living picture: who there is, how each is, and what goes between them. What stands in it is also in the table.

import { short } from "/console/figures.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 80;
const GAP = 18;
const TOP = 14;
// More of a kind would be too small to read; the table has them all.
const MOST = 10;
const SPARKS = 60;
const SPARK_HEIGHT = 15;
// Numbers on lines keep so far from each other, and look for a place along their line in this order.
const LABEL_ROOM = 24;
const LABEL_PLACES = [0.5, 0.4, 0.6, 0.3, 0.7, 0.22, 0.78, 0.15, 0.85];
// Below this width the picture stands upright.
const UPRIGHT_BELOW = 700;
// Dots of a line are so far apart; one that passes as many of them a second as there are calls would be a blur, so the
// speed grows with the logarithm.
const DOTS = 14;

const COLUMNS = [
  { x: 64, width: 104 },
  { x: 216, width: 128 },
  { x: 434, width: 184 },
  { x: 690, width: 196 },
  { x: 928, width: 176 },
  { x: 1134, width: 152 },
];
const WIDE = 1224;
const UPRIGHT = 360;

export class Picture {
  #svg;
  #lines = element("g", { class: "lines" });
  #marks = element("g", { class: "labels" });
  #boxes = element("g", { class: "boxes" });
  #nodes = new Map();
  #edges = new Map();
  #places = new Map();
  #shape = "";
  #moving = true;

  constructor(svg) {
    this.#svg = svg;
    svg.append(this.#lines, this.#boxes, this.#marks);
  }

  /** Let the dots run, or stand. */
  move(moving) {
    this.#moving = moving;
    for (const edge of this.#edges.values()) edge.run(moving);
  }

  /** Show a model. */
  show(model) {
    const tiers = tiersOf(model);
    const upright = this.#svg.parentElement.clientWidth < UPRIGHT_BELOW;
    const shape = JSON.stringify([upright, tiers.map((tier) => tier.map((node) => node.id))]);
    if (shape !== this.#shape) {
      this.#shape = shape;
      this.#places = upright ? this.#stack(tiers) : this.#spread(tiers);
    }
    const nodes = tiers.flat();
    sync(this.#nodes, nodes, (node) => new Box(this.#boxes, node), (box, node) => box.show(node, this.#places.get(node.id), this.#svg));
    const edges = edgesOf(model).filter((edge) => this.#places.has(edge.from) && this.#places.has(edge.to));
    // Every line keeps a place for its number, also while it has none: a number that comes moves no other.
    const taken = [];
    sync(this.#edges, edges, () => new Line(this.#lines, this.#marks, this.#moving), (line, edge) => line.show(edge, curveBetween(this.#places.get(edge.from), this.#places.get(edge.to), upright), taken, upright));
  }

  #spread(tiers) {
    const rows = Math.max(...tiers.map((tier) => tier.length));
    const height = TOP * 2 + rows * (HEIGHT + GAP) - GAP;
    this.#svg.setAttribute("viewBox", `0 0 ${WIDE} ${height}`);
    const places = new Map();
    tiers.forEach((tier, column) => tier.forEach((node, row) => {
      // Evenly over the height, so that lines between two columns cross as little as they can.
      const y = (height / tier.length) * (row + 0.5);
      places.set(node.id, { ...COLUMNS[column], y, column, row, of: tier.length });
    }));
    return places;
  }

  #stack(tiers) {
    const places = new Map();
    let y = TOP + HEIGHT / 2;
    [[...tiers[0], ...tiers[1]], ...tiers.slice(2)].forEach((tier, column) => {
      const across = column === 4 ? 3 : 2;
      tier.forEach((node, index) => {
        const width = UPRIGHT / across - 12;
        const last = tier.length % across === 1 && index === tier.length - 1 && across === 2;
        places.set(node.id, { x: last ? UPRIGHT / 2 : (UPRIGHT / across) * ((index % across) + 0.5), y: y + Math.floor(index / across) * (HEIGHT + 12), width, column, row: index, of: tier.length });
      });
      y += Math.ceil(tier.length / across) * (HEIGHT + 12) + 34;
    });
    this.#svg.setAttribute("viewBox", `0 0 ${UPRIGHT} ${y - HEIGHT / 2 - 24}`);
    return places;
  }
}

class Box {
  #group;
  #parts;
  #sparks = [];
  #at = 0;

  constructor(parent) {
    this.#group = element("g", { class: "box" });
    this.#parts = {
      frame: element("rect", { rx: 12, height: HEIGHT }),
      spark: element("path", { class: "spark" }),
      mark: element("path", { class: "mark" }),
      name: element("text", { class: "name" }),
      first: element("text", { class: "fact strong" }),
      second: element("text", { class: "fact" }),
    };
    this.#group.append(...Object.values(this.#parts));
    parent.append(this.#group);
  }

  show(node, { x, y, width }) {
    const { frame, spark, mark, name, first, second } = this.#parts;
    this.#group.dataset.state = node.state;
    this.#group.dataset.id = node.id;
    this.#group.dataset.kind = node.kind;
    this.#group.setAttribute("transform", `translate(${x - width / 2} ${y - HEIGHT / 2})`);
    frame.setAttribute("width", width);
    const inset = width < 120 ? 11 : 15;
    mark.setAttribute("d", MARKS[node.state]);
    mark.setAttribute("transform", `translate(${width - inset} 17)`);
    text(name, node.name, inset, 23);
    text(first, node.first, inset, 41);
    text(second, node.second, inset, 57);
    if (performance.now() - this.#at > 950) {
      this.#at = performance.now();
      this.#sparks.push(node.rate ?? 0);
      if (this.#sparks.length > SPARKS) this.#sparks.shift();
    }
    spark.setAttribute("d", sparkline(this.#sparks, width));
  }

  remove() {
    this.#group.remove();
  }
}

class Line {
  #path = element("path", { class: "way" });
  #dots = element("path", { class: "dots" });
  #label = element("text", { class: "rate" });
  #run;
  #moving;

  constructor(lines, labels, moving) {
    lines.append(this.#path, this.#dots);
    labels.append(this.#label);
    this.#moving = moving;
    this.#run = this.#dots.animate([{ strokeDashoffset: DOTS }, { strokeDashoffset: 0 }], { duration: 1000, iterations: Infinity });
    this.run(moving);
  }

  run(moving) {
    this.#moving = moving;
    if (moving) this.#run.play();
    else this.#run.pause();
  }

  show(edge, curve, taken, upright) {
    this.#path.setAttribute("d", curve.d);
    this.#dots.setAttribute("d", curve.d);
    const busy = edge.rate >= 0.05;
    this.#path.dataset.kind = this.#dots.dataset.kind = edge.kind;
    this.#dots.toggleAttribute("data-still", !busy);
    const width = Math.min(7, 1 + Math.log2(1 + edge.rate) * 0.6);
    this.#path.setAttribute("stroke-width", busy ? width : 1);
    this.#dots.setAttribute("stroke-width", Math.max(3, width));
    if (this.#moving) this.#run.updatePlaybackRate(busy ? 0.6 + Math.log10(1 + edge.rate) : 0);
    if (edge.kind === "log" || (upright && edge.crowded)) return;
    const places = LABEL_PLACES.map(curve.at);
    const free = (place) => taken.every((other) => Math.abs(other.x - place.x) > LABEL_ROOM * 1.3 || Math.abs(other.y - place.y) > LABEL_ROOM * 0.6);
    const at = places.find(free) ?? places[0];
    taken.push(at);
    text(this.#label, busy ? short(edge.rate) : "", at.x, at.y + 4);
  }

  remove() {
    this.#run.cancel();
    this.#path.remove();
    this.#dots.remove();
    this.#label.remove();
  }
}

// A shape for each state, because a colour alone is not seen by everybody: dot, triangle, cross, ring.
const MARKS = {
  ok: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
  warn: "M0 -6L6.5 5.5H-6.5Z",
  bad: "M-6 -4L-4 -6L0 -2L4 -6L6 -4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0Z",
  unknown: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0ZM-3 0a3 3 0 1 1 6 0a3 3 0 1 1 -6 0Z",
};

/** Return the columns of the picture, each a list of nodes from top to bottom. */
export function tiersOf(model) {
  const gone = (each) => `gone, heard ${Math.round(each.age)} s ago`;
  const busy = (each) => `${Math.round(each.cpu * 100)} % CPU`;
  const perhaps = (each) => ({ ...each, state: model.redis.state === "bad" ? "unknown" : each.state });
  const process = (each, what) => ({
    id: each.name, kind: each.role, name: each.name, state: each.state, rate: each.rate,
    first: each.phase === "gone" ? gone(each) : `${short(each.rate)} ${what}`,
    second: each.phase === "gone" ? "" : each.phase === "ready" ? `${busy(each)}${each.processes > 1 ? ` of ${each.processes} processes` : ""}` : each.phase,
  });
  const nodes = model.shards.flatMap((shard) => shard.nodes.map((node) => ({
    id: `${shard.number}/${node.name}`, kind: "database", name: node.label, state: node.state, rate: node.rate,
    first: node.answers ? `${short(node.rate)} statements/s` : "does not answer",
    second: node.primary ? (shard.writes ? "takes writes" : "takes no writes") : node.state === "bad" ? "takes no reads" : `${lagOf(node.lag)} behind`,
  })));
  return [
    [{ id: "clients", kind: "clients", name: "Clients", state: "ok", rate: model.rate, first: `${short(model.rate)}/s`, second: model.failing >= 0.05 ? `${short(model.failing)} fail` : "" }],
    [{ id: "balancer", kind: "balancer", name: "Balancer", state: model.instances.some((each) => each.phase === "ready") ? "ok" : "bad", rate: model.rate, first: `to ${model.instances.filter((each) => each.phase === "ready").length} of ${model.instances.length}`, second: model.shed >= 0.05 ? `${short(model.shed)} shed` : "instances" }],
    model.instances.slice(0, MOST).map((each) => process(each, "requests/s")),
    [{ id: "redis", kind: "redis", name: "Redis", state: model.redis.state, rate: model.redis.calls, first: model.redis.state === "bad" ? "does not answer" : `${short(model.redis.calls)} calls/s`, second: model.redis.state === "bad" ? "" : `${(model.redis.bytes / 1e6).toFixed(1)} MB` }, ...nodes.slice(0, MOST)],
    [...model.relays.map(perhaps).map((each) => process(each, "messages/s")), ...model.workers.map(perhaps).map((each) => process(each, "tasks/s"))].slice(0, MOST),
    model.outside.map((each) => ({ id: each.name, kind: "outside", name: { payments: "Payments", smtp: "Mail", storage: "Storage" }[each.name], state: each.state, rate: each.rate, first: each.state === "bad" ? "breaker open" : `${short(each.rate)}/s`, second: each.failing >= 0.05 ? `${short(each.failing)} fail` : "" })),
  ];
}

function edgesOf(model) {
  const edges = [{ id: "in", from: "clients", to: "balancer", rate: model.rate, kind: "request" }];
  model.instances.forEach((each, index) => {
    edges.push({ id: `in ${each.name}`, from: "balancer", to: each.name, rate: each.rate, kind: "request" });
    edges.push({ id: `${each.name} redis`, from: each.name, to: "redis", rate: each.redis, kind: "cache", crowded: true });
  });
  for (const shard of model.shards) {
    const primary = shard.nodes.find((node) => node.primary);
    shard.nodes.forEach((node, row) => {
      const id = `${shard.number}/${node.name}`;
      model.instances.forEach((each, index) => edges.push({ id: `${each.name} ${id}`, from: each.name, to: id, rate: each.statements[node.key] ?? 0, kind: "sql", crowded: true }));
      for (const each of [...model.relays, ...model.workers]) edges.push({ id: `${each.name} ${id}`, from: each.name, to: id, rate: each.statements[node.key] ?? 0, kind: "sql", crowded: true });
      if (primary && !node.primary && node.answers && node.healthy) edges.push({ id: `log ${id}`, from: `${shard.number}/${primary.name}`, to: id, rate: 0.5, kind: "log" });
    });
  }
  for (const relay of model.relays) for (const worker of model.workers) edges.push({ id: `${relay.name} ${worker.name}`, from: relay.name, to: worker.name, rate: relay.rate / model.workers.length, kind: "task" });
  for (const worker of model.workers) for (const each of model.outside) edges.push({ id: `${worker.name} ${each.name}`, from: worker.name, to: each.name, rate: each.rate / model.workers.length, kind: "call" });
  return edges;
}

/** Return the curve from one box to another: out of the side that faces it, or around the side within a column. */
function curveBetween(from, to, upright) {
  let [start, bend, turn, end] = [];
  if (from.column === to.column && !upright) {
    const side = from.x + from.width / 2;
    const away = 12 + Math.abs(to.y - from.y) * 0.06;
    [start, bend, turn, end] = [[side, from.y], [side + away, from.y], [side + away, to.y], [side, to.y]];
  } else if (upright) {
    const down = to.y > from.y ? 1 : -1;
    const level = Math.abs(to.y - from.y) < HEIGHT;
    const reach = Math.max(20, Math.abs(to.y - from.y) * 0.4);
    start = level ? [from.x + Math.sign(to.x - from.x) * from.width / 2, from.y] : [from.x, from.y + (down * HEIGHT) / 2];
    end = level ? [to.x - Math.sign(to.x - from.x) * to.width / 2, to.y] : [to.x, to.y - (down * HEIGHT) / 2];
    [bend, turn] = level ? [start, end] : [[start[0], start[1] + down * reach * 0.6], [end[0], end[1] - down * reach * 0.6]];
  } else {
    const right = to.x > from.x ? 1 : -1;
    start = [from.x + (right * from.width) / 2, from.y];
    end = [to.x - (right * to.width) / 2, to.y];
    const reach = Math.abs(end[0] - start[0]) * 0.45 * right;
    [bend, turn] = [[start[0] + reach, start[1]], [end[0] - reach, end[1]]];
  }
  const at = (t) => {
    const u = 1 - t;
    const mix = (axis) => u ** 3 * start[axis] + 3 * u * u * t * bend[axis] + 3 * u * t * t * turn[axis] + t ** 3 * end[axis];
    return { x: mix(0), y: mix(1) };
  };
  return { d: `M${start}C${bend} ${turn} ${end}`, at };
}

function sparkline(values, width) {
  const most = Math.max(...values, 1);
  if (values.length < 2) return "";
  const step = (width - 28) / (SPARKS - 1);
  const left = 14 + (SPARKS - values.length) * step;
  return values.map((value, index) => `${index ? "L" : "M"}${(left + index * step).toFixed(1)} ${(HEIGHT - 5 - (value / most) * SPARK_HEIGHT).toFixed(1)}`).join("");
}

function lagOf(seconds) {
  return seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

function sync(known, wanted, make, show) {
  const left = new Set(known.keys());
  for (const each of wanted) {
    if (!known.has(each.id)) known.set(each.id, make(each));
    show(known.get(each.id), each);
    left.delete(each.id);
  }
  for (const id of left) {
    known.get(id).remove();
    known.delete(id);
  }
}

function text(node, words, x, y) {
  node.textContent = words;
  node.setAttribute("x", x);
  node.setAttribute("y", y);
}

export function element(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
