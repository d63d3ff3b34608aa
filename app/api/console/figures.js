// What a census means: rates out of counters, one state for each thing, and what has changed since the census before.
// Counters are absolute and each process has its own, so it does not matter which instance tells of them.

// Seconds over which a rate is taken: two pulses would jump, ten would hide what has just happened.
const RATE_SECONDS = 2;
const LATENCY_SECONDS = 5;
// An event loop that keeps everybody waiting for so long, a replica so far behind: worth looking at.
const LATE_SECONDS = 0.25;
const LAG_SECONDS = 1;
// A step that waits for its provider is tried again within seconds; older than that, somebody waits.
const QUEUE_SECONDS = 30;

export class Figures {
  #told = new Map(); // process -> its pulses of the last seconds, oldest first

  /** Return the cluster as a census tells of it. */
  take(census) {
    const keep = new Set();
    for (const pulse of census.processes) {
      const key = `${pulse.name}/${pulse.pid}/${pulse.started}`;
      keep.add(key);
      pulse.key = key;
      const before = this.#told.get(key) ?? [];
      if (!before.length || before.at(-1).at !== pulse.at) before.push(pulse);
      while (before.length > 2 && before[1].at < pulse.at - LATENCY_SECONDS * 1000) before.shift();
      this.#told.set(key, before);
    }
    for (const key of this.#told.keys()) if (!keep.has(key)) this.#told.delete(key);
    return this.#model(census);
  }

  #model(census) {
    const named = (role) => byName(census.processes.filter((pulse) => pulse.role === role)).map((group) => this.#process(group));
    const living = census.processes.filter((pulse) => !pulse.gone);
    const instances = named("api");
    const model = {
      redis: redisOf(census),
      instances,
      relays: named("relay"),
      workers: named("worker"),
      shards: shardsOf(living),
      breakers: breakersOf(living),
      rate: sum(instances.map((each) => each.rate)),
      failing: sum(instances.map((each) => each.failing)),
      latency: this.#latency(living),
      ...this.#cache(living),
      ...queueOf(living),
      shed: sum(living.map((pulse) => total(this.#rates(pulse, "shed")))),
      limited: sum(living.map((pulse) => total(this.#rates(pulse, "limited")))),
      events: census.events,
      counts: census.counts,
      window: census.window,
    };
    for (const shard of model.shards) for (const node of shard.nodes) node.rate = sum([...instances, ...model.relays, ...model.workers].map((each) => each.statements[node.key] ?? 0));
    model.outside = outsideOf(model);
    return model;
  }

  #process(pulses) {
    const living = pulses.filter((pulse) => !pulse.gone);
    const pulse = living.at(-1) ?? pulses.at(-1);
    const requests = merged(living.map((each) => this.#rates(each, "requests")));
    const late = Math.max(0, ...living.map((each) => each.late));
    const phase = living.length ? pulse.phase : "gone";
    return {
      name: pulse.name,
      role: pulse.role,
      keys: living.map((each) => each.key),
      age: pulse.age,
      phase,
      state: !living.length ? "bad" : phase !== "ready" || late > LATE_SECONDS ? "warn" : "ok",
      processes: living.length,
      rate: pulse.role === "api" ? total(requests) : total(merged(living.map((each) => this.#rates(each, pulse.role === "relay" ? "published" : "tasks")))),
      failing: requests["5xx"] ?? 0,
      cpu: sum(living.map((each) => this.#cpu(each))),
      late,
      redis: sum(living.map((each) => { const read = this.#rates(each, "cache"); return (read.l2 ?? 0) + (read.miss ?? 0) + (read.bypass ?? 0); })),
      statements: statementsOf(merged(living.map((each) => this.#rates(each, "statements")))),
      outbound: merged(living.map((each) => this.#rates(each, "outbound"))),
    };
  }

  #span(pulse, seconds) {
    const told = this.#told.get(pulse.key);
    const last = told.at(-1);
    const first = told.findLast((each) => each.at <= last.at - seconds * 1000) ?? told[0];
    return { first, last, seconds: (last.at - first.at) / 1000 };
  }

  #rates(pulse, figure) {
    const { first, last, seconds } = this.#span(pulse, RATE_SECONDS);
    if (seconds <= 0) return {};
    const before = first.figures[figure] ?? {};
    return Object.fromEntries(Object.entries(last.figures[figure] ?? {}).map(([label, value]) => [label, Math.max(0, value - (before[label] ?? 0)) / seconds]));
  }

  #cpu(pulse) {
    const { first, last, seconds } = this.#span(pulse, RATE_SECONDS);
    return seconds > 0 ? (last.cpu - first.cpu) / seconds : 0;
  }

  #latency(living) {
    const counts = {};
    for (const pulse of living) {
      const { first, last } = this.#span(pulse, LATENCY_SECONDS);
      for (const [bound, value] of Object.entries(last.figures.durations ?? {})) counts[bound] = (counts[bound] ?? 0) + value - (first.figures.durations?.[bound] ?? 0);
    }
    const buckets = Object.entries(counts).map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count]).sort((a, b) => a[0] - b[0]);
    return { p50: quantile(buckets, 0.5), p95: quantile(buckets, 0.95), p99: quantile(buckets, 0.99) };
  }

  #cache(living) {
    const read = merged(living.map((pulse) => this.#rates(pulse, "cache")));
    const all = total(read);
    return { hits: all ? ((read.l1 ?? 0) + (read.l2 ?? 0)) / all : null, near: all ? (read.l1 ?? 0) / all : null };
  }
}

/** Return in words what is different from one model to the next, each with its state. */
export function changes(before, after) {
  const said = [];
  const say = (state, text) => said.push({ state, text });
  if (before.redis.state !== "bad" && after.redis.state === "bad") say("bad", "Redis does not answer: only the instance that serves this page is known");
  // Who tells nobody is not gone: without Redis nobody can be told.
  const blind = [before, after].some((model) => model.redis.state === "bad");
  if (before.redis.state === "bad" && after.redis.state !== "bad") say("ok", "Redis answers again");
  if (!blind) for (const role of ["instances", "relays", "workers"]) {
    const known = new Map(before[role].map((each) => [each.name, each]));
    for (const now of after[role]) {
      const then = known.get(now.name);
      known.delete(now.name);
      if (!then) say("ok", `${now.name} joins`);
      else if (then.phase !== "gone" && now.phase === "gone") say("bad", `${now.name} is gone: nothing heard for ${now.age.toFixed(1)} s`);
      else if (then.phase === "gone" && now.phase !== "gone") say("ok", `${now.name} is back, as a new process`);
      else if (now.processes && !now.keys.some((key) => then.keys.includes(key))) say("warn", `${now.name} was replaced by a new process`);
      else if (then.phase !== now.phase) say(now.phase === "ready" ? "ok" : "warn", `${now.name} is ${now.phase}`);
    }
    for (const then of known.values()) if (then.phase !== "gone") say("warn", `${then.name} left: it was told to go, and had finished`);
  }
  for (const shard of after.shards) {
    const then = before.shards.find((each) => each.number === shard.number);
    if (!then) continue;
    const where = after.shards.length > 1 ? ` of shard ${shard.number}` : "";
    const [old, now] = [then, shard].map((each) => each.nodes.find((node) => node.primary)?.name);
    if (old && now && old !== now) say("warn", `the primary${where} is another server now: ${now} instead of ${old}`);
    if (then.writes !== shard.writes) say(shard.writes ? "ok" : "bad", shard.writes ? `the primary${where} takes writes again` : `nobody${where} takes writes`);
    for (const node of shard.nodes.filter((each) => !each.primary)) {
      const was = then.nodes.find((each) => each.name === node.name);
      if (was && !was.primary && was.healthy !== node.healthy) say(node.healthy ? "ok" : "bad", node.healthy ? `${node.label} takes reads again` : `${node.label} takes no reads: it ${node.answers ? `is ${node.lag.toFixed(1)} s behind` : "does not answer"}`);
    }
  }
  for (const now of after.breakers) {
    const then = before.breakers.find((each) => each.name === now.name);
    if (!then || blind) continue;
    if (!then.open && now.open) say("bad", `the breaker of ${now.name} opens in ${now.open} of ${now.of} processes`);
    if (then.open && !now.open) say("ok", `the breaker of ${now.name} is closed everywhere`);
  }
  return said;
}

/** Return the state of the whole, and why. */
export function verdict(model) {
  const wrong = [];
  if (model.redis.state === "bad") wrong.push("Redis does not answer");
  for (const shard of model.shards) {
    if (!shard.writes) wrong.push("no primary takes writes");
    for (const node of shard.nodes) if (!node.primary && node.state !== "ok") wrong.push(`${node.label} ${node.state === "bad" ? "is gone" : "struggles"}`);
  }
  for (const each of [...model.instances, ...model.relays, ...model.workers]) if (each.state !== "ok") wrong.push(`${each.name} ${each.phase === "gone" ? "is gone" : each.phase === "ready" ? "is late" : `is ${each.phase}`}`);
  for (const each of model.breakers) if (each.open) wrong.push(`breaker of ${each.name} open`);
  if (model.oldest > QUEUE_SECONDS) wrong.push(`a message is ${Math.round(model.oldest)} s old`);
  if (model.shed >= 1) wrong.push(`${Math.round(model.shed)} requests a second are shed`);
  return { state: wrong.length ? "warn" : "ok", text: wrong.length ? wrong.slice(0, 3).join(" · ") + (wrong.length > 3 ? ` · and ${wrong.length - 3} more` : "") : "All is well" };
}

/** Return a number of calls a second as short as it can be read. */
export function short(value) {
  if (value >= 9950) return `${Math.round(value / 1000)}k`;
  if (value >= 995) return `${(value / 1000).toFixed(1)}k`;
  return value >= 9.95 || value === 0 ? String(Math.round(value)) : value.toFixed(1);
}

export const sum = (values) => values.reduce((all, value) => all + value, 0);
const total = (values) => sum(Object.values(values));

function merged(all) {
  const found = {};
  for (const each of all) for (const [label, value] of Object.entries(each)) found[label] = (found[label] ?? 0) + value;
  return found;
}

function byName(pulses) {
  return [...Map.groupBy(pulses, (pulse) => pulse.name).values()];
}

function redisOf({ redis, processes }) {
  if (!redis) return { state: "bad", calls: 0, bytes: 0 };
  const open = processes.filter((pulse) => !pulse.gone && pulse.figures.breakers?.redis).length;
  return { ...redis, state: open ? "warn" : "ok" };
}

function shardsOf(living) {
  const views = [...Map.groupBy(living.flatMap((pulse) => pulse.shards), (shard) => shard.shard).values()];
  return views.map((seen) => ({
    number: seen[0].shard,
    // One process that cannot reach a server says more of that process; what most see is how it is.
    writes: most(seen.map((view) => view.takes_writes)),
    nodes: seen[0].nodes.map(({ name }) => nodeOf(name, seen, views.length > 1 ? `${seen[0].shard}: ` : "")),
  })).sort((a, b) => a.number - b.number);
}

function nodeOf(name, seen, prefix) {
  const views = seen.map((shard) => shard.nodes.find((node) => node.name === name)).filter(Boolean);
  const [primary, answers, healthy] = ["primary", "answers", "healthy"].map((field) => most(views.map((view) => view[field])));
  const lag = Math.max(0, ...views.map((view) => view.lag));
  const shard = seen[0].shard;
  const takes = primary ? answers && most(seen.map((view) => view.takes_writes)) : healthy;
  const some = views.some((view) => (primary ? !view.answers : !view.healthy));
  return {
    name, primary, answers, healthy, lag,
    key: `${shard}/${primary ? "primary" : name}`,
    label: prefix + (primary ? (name === "replica-0" ? "primary" : `primary (${name})`) : name === "replica-0" ? "former primary" : name),
    state: !takes ? "bad" : some || lag > LAG_SECONDS ? "warn" : "ok",
  };
}

function breakersOf(living) {
  const found = {};
  for (const pulse of living) for (const [name, open] of Object.entries(pulse.figures.breakers ?? {})) {
    found[name] ??= { name, open: 0, of: 0 };
    found[name].of += 1;
    found[name].open += open ? 1 : 0;
  }
  return Object.values(found).sort((a, b) => a.name.localeCompare(b.name));
}

function outsideOf({ instances, workers, breakers }) {
  const calls = merged([...instances, ...workers].map((each) => each.outbound));
  return ["payments", "smtp", "storage"].map((name) => {
    const ofIt = (outcome) => sum(Object.entries(calls).filter(([label]) => label.startsWith(name) && (!outcome || !label.endsWith(outcome))).map(([, value]) => value));
    const open = breakers.filter((each) => each.name.startsWith(name)).some((each) => each.open);
    return { name, rate: ofIt(), failing: ofIt("/ok"), state: open ? "bad" : ofIt("/ok") > 0 ? "warn" : "ok" };
  });
}

function queueOf(living) {
  // Every relay measures all shards; the newest of them is right.
  const relay = living.filter((pulse) => pulse.role === "relay").at(-1);
  if (!relay) return { waiting: null, oldest: null, letters: null };
  const of = (figure) => Object.values(relay.figures[figure] ?? {});
  return { waiting: sum(of("waiting")), oldest: Math.max(0, ...of("oldest")), letters: sum(of("letters")) };
}

function statementsOf(rates) {
  const found = {};
  for (const [label, value] of Object.entries(rates)) {
    const key = label.split("/").slice(0, 2).join("/");
    found[key] = (found[key] ?? 0) + value;
  }
  return found;
}

function most(votes) {
  return votes.filter(Boolean).length * 2 >= votes.length;
}

function quantile(buckets, share) {
  const all = buckets.at(-1)?.[1] ?? 0;
  if (!all) return null;
  const wanted = all * share;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= wanted) return bound === Infinity ? low : low + (bound - low) * ((wanted - below) / (count - below || 1));
    [low, below] = [bound, count];
  }
  return low;
}
