// The buttons that break the local cluster and mend it: they call the cluster's own switchboard on this machine, with the
// key that this run of it gave out. No deployment has one, and then there are no buttons.

const LOOK_MS = 1000;

export class Switchboard {
  #panel;
  #faults;
  #said;
  #place;
  #buttons = new Map();
  #looking;

  constructor(panel) {
    this.#panel = panel;
    this.#faults = panel.querySelector("#faults");
    this.#said = panel.querySelector("#switchboard-said");
  }

  /** Show the switchboard at `place`, `{url, key}`, or none. */
  open(place) {
    if (place?.url === this.#place?.url && place?.key === this.#place?.key) return;
    this.#place = place;
    this.#panel.hidden = !place;
    this.#buttons.clear();
    this.#faults.replaceChildren();
    clearInterval(this.#looking);
    if (!place) return;
    this.#looking = setInterval(() => this.#look(), LOOK_MS);
    this.#look();
  }

  async #look() {
    if (document.hidden) return;
    this.#show(await this.#ask("GET", "/faults"));
  }

  async #ask(method, path) {
    try {
      const answer = await fetch(this.#place.url + path, { method, headers: { Authorization: `Bearer ${this.#place.key}` }, credentials: "omit" });
      const told = await answer.json();
      if (answer.ok) return told;
      this.#said.textContent = told.error.message;
    } catch {
      this.#said.textContent = "The switchboard does not answer: has the cluster been stopped?";
    }
    return null;
  }

  #show(told) {
    if (!told) return;
    if (!this.#buttons.size) this.#make(told.items);
    for (const fault of told.items) {
      const button = this.#buttons.get(fault.name);
      button.setAttribute("aria-pressed", String(fault.active));
      button.textContent = fault.active ? `Mend (${Math.ceil(fault.seconds_left)} s left)` : fault.kind;
    }
  }

  #make(items) {
    for (const [target, faults] of Map.groupBy(items, (fault) => fault.target)) {
      const row = document.createElement("div");
      row.role = "group";
      const name = document.createElement("h3");
      name.textContent = target;
      row.ariaLabel = target;
      row.append(name);
      for (const fault of faults) {
        const button = document.createElement("button");
        button.type = "button";
        button.dataset.fault = fault.name;
        button.title = fault.does;
        button.ariaDescription = fault.does;
        button.addEventListener("click", () => this.#switch(fault, button.getAttribute("aria-pressed") === "true"));
        this.#buttons.set(fault.name, button);
        row.append(button);
      }
      this.#faults.append(row);
    }
  }

  async #switch(fault, active) {
    const told = await this.#ask(active ? "DELETE" : "PUT", `/faults/${fault.name}`);
    if (told) this.#said.textContent = active ? `${fault.target}: mended; now it has to come back by itself.` : fault.does;
    this.#show(told);
  }
}
