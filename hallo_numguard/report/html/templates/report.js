"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const ROWS_AT_ONCE = 40;
  const ROW_HEIGHT = 18;
  const MAX_MATCHES = 500;
  const LABEL = 44; // characters
  const HOVER_LINE = 90; // characters
  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const narrow = () => window.innerWidth < 640;

  // Plotly reads some HTML and formulas between dollars in its texts; names are to be shown as they are.
  const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" };
  const plain = (text) => String(text).replace(/[&<>$]/g, (character) => ENTITIES[character]);
  const wrapped = (text) => text.match(new RegExp(`.{1,${HOVER_LINE}}`, "gu")).map(plain).join("<br>");
  const shortened = (text, width) =>
    text.length <= width ? text : `${text.slice(0, width / 3)}…${text.slice(1 - (2 * width) / 3)}`;

  function written(value) {
    const rounded = Number(value.toPrecision(3));
    return rounded >= 1e5 || rounded < 1e-3 ? rounded.toExponential().replace("e+", "e") : String(rounded);
  }

  // At most about six round values between two numbers, for a logarithmic scale; never none.
  function roundTicks(low, high) {
    const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const every = Math.ceil((to - from + 1) / 6);
    const digits = to - from <= 2 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let power = from; power <= to; power += every) ticks.push(...digits.map((digit) => Number(`${digit}e${power}`)));
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    return inside.length > 1 ? inside : [low, high];
  }

  function powersOfTwo(low, high) {
    const [from, to] = [Math.floor(Math.log2(low)), Math.ceil(Math.log2(high))];
    const every = Math.ceil((to - from + 1) / 6);
    const powers = [];
    for (let power = from; power <= to; power += every) powers.push(power);
    return { tickvals: powers.map((power) => 2 ** power), ticktext: powers.map((power) => `2<sup>${power}</sup>`) };
  }

  const positive = (values) => values.filter((value) => value > 0);
  const lowest = (values) => values.reduce((least, value) => Math.min(least, value), Infinity);
  const highest = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);
  const later = (work) => {
    let timer;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(work, 150);
    };
  };

  function layout(more) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line") };
    const themed = Object.entries(more).map(([key, value]) => [key, /^[xy]axis/.test(key) ? { ...axis, ...value } : value]);
    return {
      paper_bgcolor: colour("page"),
      plot_bgcolor: colour("page"),
      font: { color: colour("text"), family: "system-ui, sans-serif", size: 12 },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left" },
      ...Object.fromEntries(themed),
    };
  }

  // -- loss, loss scale and gradients ---------------------------------------------------------------------------------

  const valuesOf = (...names) =>
    positive(figures.timeline.lines.filter((line) => names.includes(line.name)).flatMap((line) => line.values));

  function logarithmic(values, ticks) {
    if (!values.length) return { type: "log" };
    const marks = ticks(lowest(values), highest(values));
    return { type: "log", ...(Array.isArray(marks) ? { tickvals: marks, ticktext: marks.map(written) } : marks) };
  }

  const PANELS = { loss: "y", "loss scale": "y2", norm: "y3", absmax: "y3" };
  const DASHES = ["solid", "dash", "dot", "dashdot"];

  function drawTimeline() {
    const timeline = figures.timeline;
    if (!timeline) return;
    const ranks = [...new Set(timeline.lines.map((line) => line.rank))];
    const names = Object.keys(PANELS);
    const steps = timeline.lines.flatMap((line) => line.steps);
    const few = highest(steps) - lowest(steps) < 12;
    const traces = timeline.lines.flatMap((line) => {
      const ink = colour(`series-${names.indexOf(line.name) + 1}`);
      const label = plain(ranks.length > 1 ? `${line.name}, ${line.rank}` : line.name);
      return [lineOf(line, ink, label, DASHES[ranks.indexOf(line.rank) % DASHES.length]), marksOf(line, label)];
    });
    const swatch = { symbol: "square", size: 12, color: colour("skipped") };
    traces.push({ x: [null], y: [null], mode: "markers", marker: swatch, name: "skipped step" });
    Plotly.react(
      document.getElementById("timeline"),
      traces,
      layout({
        height: 560,
        margin: { l: 66, r: 16, t: 8, b: 40 },
        legend: { orientation: "h", yanchor: "bottom", y: 1.02 },
        hovermode: "closest",
        shapes: [...skippedRanges(timeline.skipped), ...limitLine(timeline.limit)],
        xaxis: { title: { text: "step" }, anchor: "y3", tickformat: "d", dtick: few ? 1 : undefined },
        yaxis: { title: { text: "loss" }, domain: [0.7, 1] },
        yaxis2: { title: { text: "loss scale" }, domain: [0.38, 0.66], ...logarithmic(valuesOf("loss scale"), powersOfTwo) },
        yaxis3: { title: { text: "norm, absmax" }, domain: [0, 0.34], ...logarithmic(valuesOf("norm", "absmax"), roundTicks) },
      }),
      CONFIG,
    );
  }

  function lineOf(line, ink, label, dash) {
    const bad = new Set(line.bad);
    // Zero has no place on a logarithmic axis.
    const shown = line.values.map((value, i) => (bad.has(line.steps[i]) || (line.name !== "loss" && !value) ? null : value));
    return {
      x: line.steps, y: shown, yaxis: PANELS[line.name], name: label, legendgroup: label,
      mode: "lines+markers", line: { color: ink, dash, width: 1.5 }, marker: { size: 5 },
      hovertemplate: `step %{x}<br>${label} %{y:.5g}<extra></extra>`,
    };
  }

  // Non-finite values stand at the top of their panel.
  function marksOf(line, label) {
    const top = line.values.some((value) => value > 0) ? highest(positive(line.values)) : 1;
    return {
      x: line.bad, y: line.bad.map(() => top), yaxis: PANELS[line.name], legendgroup: label, showlegend: false,
      mode: "markers", marker: { symbol: "x", size: 9, color: colour("bad") },
      hovertemplate: `step %{x}<br>${label} not finite<extra></extra>`,
    };
  }

  function skippedRanges(steps) {
    const ranges = [];
    for (const step of steps) {
      const last = ranges.at(-1);
      if (last && step === last[1] + 1) last[1] = step;
      else ranges.push([step, step]);
    }
    return ranges.slice(-500).map(([from, to]) => ({
      type: "rect", layer: "below", yref: "paper", x0: from - 0.5, x1: to + 0.5, y0: 0, y1: 1,
      fillcolor: colour("skipped"), opacity: 0.45, line: { width: 0 },
    }));
  }

  function limitLine(limit) {
    if (!limit) return [];
    const label = { text: "largest number of the dtype", textposition: "end", font: { size: 10, color: colour("dim") } };
    return [{
      type: "line", xref: "paper", yref: "y3", x0: 0, x1: 1, y0: limit, y1: limit,
      line: { color: colour("dim"), dash: "dot", width: 1 }, label,
    }];
  }

  // -- heat maps ------------------------------------------------------------------------------------------------------

  class HeatMap {
    constructor(section) {
      this.grid = figures.grids[Number(section.dataset.grid)];
      this.figure = section.querySelector(".figure");
      this.filter = section.querySelector(".filter");
      this.order = section.querySelector(".order");
      this.range = section.querySelector("output");
      this.back = section.querySelector(".back");
      this.on = section.querySelector(".on");
      this.start = 0;
      this.first = new Set(this.grid.first);
      this.marks = new Map();
      for (const [row, column, mark, count] of this.grid.marks) {
        if (!this.marks.has(row)) this.marks.set(row, new Map());
        this.marks.get(row).set(column, { mark, count });
      }
      const few = this.grid.rows.length <= ROWS_AT_ONCE;
      section.querySelector(".controls").hidden = few;
      this.order.value = few ? "given" : "bad";
      section.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
      this.filter.addEventListener("input", later(() => this.turn(-Infinity)));
      this.order.addEventListener("change", () => this.turn(-Infinity));
      this.back.addEventListener("click", () => this.turn(-ROWS_AT_ONCE));
      this.on.addEventListener("click", () => this.turn(ROWS_AT_ONCE));
    }

    turn(rows) {
      this.start = Math.max(0, this.start + rows);
      this.draw();
    }

    chosen() {
      const { rows, absmax } = this.grid;
      const wanted = this.filter.value.toLowerCase();
      const chosen = [...rows.keys()].filter((row) => rows[row].toLowerCase().includes(wanted));
      const weight = {
        given: () => 0,
        bad: (row) => (this.first.has(row) ? Infinity : (this.marks.get(row)?.size ?? 0)),
        large: (row) => highest(absmax[row]),
      }[this.order.value];
      const weights = new Map(chosen.map((row) => [row, weight(row)]));
      return chosen.sort((one, other) => (weights.get(other) > weights.get(one) ? 1 : weights.get(other) < weights.get(one) ? -1 : 0));
    }

    draw() {
      const chosen = this.chosen();
      const shown = chosen.slice(this.start, this.start + ROWS_AT_ONCE);
      const last = this.start + shown.length;
      this.range.textContent = chosen.length ? `${this.start + 1} to ${last} of ${chosen.length}` : "no such row";
      this.back.disabled = this.start === 0;
      this.on.disabled = last >= chosen.length;
      Plotly.react(this.figure, this.traces(shown), this.layoutOf(shown), CONFIG);
    }

    traces(shown) {
      const { columns, absmax } = this.grid;
      const values = positive(shown.flatMap((row) => absmax[row]));
      const ticks = values.length ? roundTicks(lowest(values), highest(values)) : [];
      const x = [...columns.keys()];
      const y = [...shown.keys()];
      const mark = (row, column) => this.marks.get(row)?.get(column);
      const cells = (value) => shown.map((row) => x.map((column) => value(row, column)));
      const text = cells((row, column) => this.hover(row, column));
      const common = { x, y, text, hovertemplate: "%{text}<extra></extra>", type: "heatmap", xgap: 1, ygap: 1, hoverongaps: false };
      const bad = shown.flatMap((row, at) => [...(this.marks.get(row) ?? [])].map(([column, { mark }]) => [column, at, mark]));
      return [
        {
          ...common,
          z: cells((row, column) => (mark(row, column) ? null : this.power(row, column))),
          colorscale: "Cividis",
          colorbar: { thickness: 12, len: 1, tickvals: ticks.map(Math.log10), ticktext: ticks.map(written) },
          showscale: !narrow(),
        },
        {
          ...common,
          z: cells((row, column) => (mark(row, column) ? 1 : null)),
          colorscale: [[0, colour("cell")], [1, colour("cell")]],
          showscale: false,
        },
        {
          x: bad.map(([column]) => column), y: bad.map(([, at]) => at), text: bad.map(([, , mark]) => mark),
          mode: "text", textfont: { color: colour("cell-text"), size: 13 }, hoverinfo: "skip", showlegend: false,
        },
      ];
    }

    power(row, column) {
      const value = this.grid.absmax[row][column];
      return value ? Math.log10(value) : null;
    }

    hover(row, column) {
      const found = this.marks.get(row)?.get(column);
      const value = this.grid.absmax[row][column];
      const largest = value === null ? "nothing finite" : `largest finite value ${value}`;
      const said = found ? `${found.mark} ${found.count} not finite, ${largest}` : largest;
      const label = this.grid.columns[column];
      const place = this.grid.what === "step" ? `step ${label}` : label;
      return `${wrapped(this.grid.rows[row])}<br>${plain(place)}<br>${plain(said)}`;
    }

    label(name, row) {
      return (this.first.has(row) ? "▶ " : "") + plain(shortened(name, narrow() ? 18 : LABEL));
    }

    layoutOf(shown) {
      const { columns, rows, what } = this.grid;
      const every = Math.ceil(columns.length / (narrow() ? 6 : 24));
      const ticks = [...columns.keys()].filter((column) => column % every === 0);
      return layout({
        height: Math.max(6, shown.length) * ROW_HEIGHT + 110,
        margin: { l: 10, r: 10, t: 32, b: 40 }, // Plotly's buttons stand above the cells
        xaxis: {
          title: { text: what }, tickvals: ticks, ticktext: ticks.map((at) => plain(columns[at])), showgrid: false,
          zeroline: false, range: [-0.5, columns.length - 0.5], automargin: true,
        },
        yaxis: {
          tickvals: [...shown.keys()], ticktext: shown.map((row) => this.label(rows[row], row)),
          range: [Math.max(1, shown.length) - 0.5, -0.5], showgrid: false, zeroline: false, automargin: true,
        },
      });
    }
  }

  // -- tensors that are not finite --------------------------------------------------------------------------------------

  const table = document.querySelector("#offenders tbody");
  const search = document.getElementById("search");
  const searched = figures.offenders.map((row) => row.join("\n").toLowerCase());

  function drawTable() {
    const wanted = search.value.toLowerCase();
    const matches = figures.offenders.filter((_, at) => searched[at].includes(wanted));
    table.replaceChildren(...matches.slice(0, MAX_MATCHES).map(tableRow));
    const shown = matches.length > MAX_MATCHES ? `the first ${MAX_MATCHES} of ` : "";
    document.getElementById("matches").textContent = `${shown}${matches.length} of ${figures.offenders.length}`;
  }

  function tableRow(values) {
    const row = document.createElement("tr");
    for (const value of values) row.insertCell().textContent = value;
    return row;
  }

  // -- light and dark ---------------------------------------------------------------------------------------------------

  const toggle = document.getElementById("theme");
  const preference = window.matchMedia("(prefers-color-scheme: dark)");
  const maps = [...document.querySelectorAll("section.grid")].map((section) => new HeatMap(section));

  function drawFigures() {
    drawTimeline();
    for (const map of maps) map.draw();
  }

  function wear(theme) {
    document.documentElement.dataset.theme = theme;
    toggle.textContent = theme === "dark" ? "Light" : "Dark";
    drawFigures();
  }

  toggle.addEventListener("click", () => wear(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  preference.addEventListener("change", (event) => wear(event.matches ? "dark" : "light"));
  search.addEventListener("input", later(drawTable));
  wear(preference.matches ? "dark" : "light");
  drawTable();
})();
