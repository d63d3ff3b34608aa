// Small charts of the last two minutes: one point a second, a scale that starts at nought, and the newest value in words.

import { element } from "/console/picture.js";

const POINTS = 120;
const WIDTH = 320;
const HEIGHT = 110;
const LEFT = 34;

export class Chart {
  #series;
  #output;
  #values;
  #paths;
  #scale;
  #format;
  #least;

  /** `series` are names with a class each; `least` is what the scale reaches at least; `format` writes a value. */
  constructor(figure, { series, least, format }) {
    this.#series = series;
    this.#least = least;
    this.#format = format;
    this.#values = series.map(() => []);
    this.#output = figure.querySelector("output");
    const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", "aria-hidden": "true" });
    this.#scale = [0, 0.5, 1].map((share) => {
      const y = this.#y(share);
      const label = element("text", { x: LEFT - 5, y: y + 4 });
      svg.append(element("path", { class: "grid", d: `M${LEFT} ${y}H${WIDTH}` }), label);
      return { share, label };
    });
    this.#paths = series.map(({ name }) => {
      const [area, line] = [element("path", { class: `area ${name}` }), element("path", { class: `line ${name}` })];
      svg.append(area, line);
      return { area, line };
    });
    figure.append(svg);
  }

  /** Add a point a second: a value or null for each series. */
  add(values) {
    values.forEach((value, index) => {
      this.#values[index].push(value);
      if (this.#values[index].length > POINTS) this.#values[index].shift();
    });
    const top = roundUp(Math.max(this.#least, ...this.#values.flat().filter((value) => value !== null)));
    for (const { share, label } of this.#scale) label.textContent = this.#format(top * share);
    this.#paths.forEach(({ area, line }, index) => {
      const runs = this.#runs(this.#values[index], top);
      line.setAttribute("d", runs.map((run) => `M${run.join("L")}`).join(""));
      area.setAttribute("d", runs.map((run) => `M${run[0][0]} ${this.#y(0)}L${run.join("L")}L${run.at(-1)[0]} ${this.#y(0)}Z`).join(""));
    });
    this.#output.replaceChildren(...this.#series.map(({ name, label }, index) => {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = `${label} ${values[index] === null ? "–" : this.#format(values[index])}`;
      return part;
    }));
  }

  #runs(values, top) {
    const runs = [[]];
    values.forEach((value, index) => {
      if (value === null) runs.push([]);
      else runs.at(-1).push([(WIDTH - (values.length - 1 - index) * ((WIDTH - LEFT) / (POINTS - 1))).toFixed(1), this.#y(value / top).toFixed(1)]);
    });
    return runs.filter((run) => run.length);
  }

  #y(share) {
    return HEIGHT - 8 - share * (HEIGHT - 20);
  }
}

function roundUp(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => step >= value * 0.999);
}
