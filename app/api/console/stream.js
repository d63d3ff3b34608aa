// The stream of server-sent events, with fetch: EventSource does not say why it was refused, and this page must know.
// It comes back by itself, soon and on whichever instance; what is shown stays until then.

// Two censuses a second: with none for so long the way there is broken, whatever TCP still believes.
const SILENCE_MS = 4000;
const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 3000;

/** Call `on.instance`, `on.census` and `on.state` with what comes, until the caller has to sign in: `on.refused`. */
export async function follow(on, signal) {
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    try {
      const refused = await listen(on, signal, () => { pause = FIRST_PAUSE_MS; });
      if (refused) {
        on.refused(refused);
        return;
      }
    } catch (error) {
      if (signal.aborted) return;
      on.state("lost", error instanceof Refusal ? error.message : "");
    }
    await new Promise((resolve) => setTimeout(resolve, pause * (0.5 + Math.random() / 2)));
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
}

class Refusal extends Error {}

/** Read one stream to its end; return the problem if it takes a person to go on. */
async function listen(on, signal, heard) {
  const ending = new AbortController();
  const end = () => ending.abort();
  signal.addEventListener("abort", end, { once: true });
  let silence = setTimeout(end, SILENCE_MS);
  try {
    const answer = await fetch("/console/stream", { signal: ending.signal, cache: "no-store" });
    if (!answer.ok) {
      const problem = await answer.json().catch(() => ({ status: answer.status, detail: "" }));
      if ([401, 403, 404].includes(answer.status)) return problem;
      throw new Refusal(problem.detail);
    }
    let rest = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return null;
      clearTimeout(silence);
      silence = setTimeout(end, SILENCE_MS);
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        const [name, data] = parse(frame);
        if (!data) continue;
        heard();
        on.state("live", "");
        on[name]?.(JSON.parse(data));
      }
    }
  } finally {
    clearTimeout(silence);
    signal.removeEventListener("abort", end);
    ending.abort();
  }
}

function parse(frame) {
  const fields = Object.fromEntries(frame.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]));
  return [fields.event, fields.data];
}
