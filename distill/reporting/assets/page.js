"use strict";
// Reads the points of curves, and shows one transcript at a time. What comes from files is set as
// text (textContent), never as markup.
const byId = (id) => document.getElementById(id);
const make = (tag, text = "", name = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  if (name) node.className = name;
  return node;
};

// Curves: the pointer, or the left and right keys, choose a step, or a place on another axis.
for (const chart of document.querySelectorAll(".chart")) {
  const { axis, log, joined, box, limits, curves } = JSON.parse(chart.dataset.points);
  const placed = curves.filter((curve) => !curve.level).flatMap((curve) => curve.steps);
  const steps = [...new Set(placed)].sort((a, b) => a - b);
  const [plot, cursor] = [chart.querySelector(".plot"), chart.querySelector(".cursor")];
  const output = chart.querySelector("output");
  const scale = log ? Math.log10 : (x) => x;
  const [first, last] = limits.map(scale);
  let chosen = -1;
  // The value of a curve at a step, between two of its points if they are joined.
  const readAt = (curve, step, values) => {
    if (curve.level) return values[0];
    const at = curve.steps.indexOf(step);
    if (at >= 0) return values[at];
    const after = curve.steps.findIndex((x) => x > step);
    if (!joined || after < 1) return null;
    const [a, b] = [scale(curve.steps[after - 1]), scale(curve.steps[after])];
    const share = (scale(step) - a) / (b - a);
    const between = values[after - 1] + share * (values[after] - values[after - 1]);
    return Number(between.toPrecision(4));
  };
  const choose = (index) => {
    chosen = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[chosen];
    const share = (scale(step) - first) / (last - first);
    cursor.style.left = `${100 * (box[0] + share * (box[1] - box[0]))}%`;
    cursor.hidden = false;
    output.replaceChildren(make("span", `${axis} ${step}`));
    for (const curve of curves) {
      const [mean, low, high] = ["mean", "low", "high"].map((key) =>
        curve[key] ? readAt(curve, step, curve[key]) : null);
      if (mean === null) continue;
      const band = low === null ? "" : ` (${low} to ${high})`;
      output.append(make("div", `${curve.name}: ${mean}${band}`, `c${curve.colour}`));
    }
  };
  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const share = ((event.clientX - area.left) / area.width - box[0]) / (box[1] - box[0]);
    const place = first + share * (last - first);
    const gaps = steps.map((x) => Math.abs(scale(x) - place));
    choose(gaps.indexOf(Math.min(...gaps)));
  });
  chart.addEventListener("keydown", (event) => {
    const change = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (change === undefined) return;
    event.preventDefault();
    choose(chosen + change);
  });
}

// Transcripts.
const STATS = {
  reverse_kl: { title: "reverse KL", levels: [0.05, 0.2, 0.5, 1, 2], sign: 1 },
  divergence: { title: "divergence", levels: [0.05, 0.2, 0.5, 1, 2], sign: 1 },
  logp: { title: "surprise, -log p of the student", levels: [0.1, 0.5, 1, 2, 4], sign: -1 },
  teacher_logp: { title: "surprise, -log p of the teacher", levels: [0.1, 0.5, 1, 2, 4], sign: -1 },
  entropy: { title: "entropy of the student", levels: [0.1, 0.3, 0.7, 1.2, 2], sign: 1 },
  teacher_entropy: { title: "entropy of the teacher", levels: [0.1, 0.3, 0.7, 1.2, 2], sign: 1 },
  advantage: { title: "advantage", levels: [0.1, 0.3, 0.7, 1.2, 2], sign: 1 },
};
const FORK = 2; // the level from which n and p stop at a token
const sources = JSON.parse(byId("transcripts-data").textContent);
const view = { rows: [], index: 0, content: null, token: -1, serial: 0 };

const unpack = async (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
};

const isWrong = (row) => (row.correct === undefined ? row.reward <= 0 : !row.correct);
const isRight = (row) => (row.correct === undefined ? row.reward > 0 : row.correct);
const FILTERS = {
  right: { wrong: isWrong, right: isRight },
  finish: { length: (row) => row.finish === "length", stop: (row) => row.finish === "stop" },
  mode: { think: (row) => row.thinking === true, no_think: (row) => row.thinking === false },
};

const chooseSource = () => {
  const { steps } = sources[byId("source").value];
  byId("step").max = steps.length - 1;
  byId("step").value = steps.length - 1;
  byId("step-label").hidden = steps.length < 2 && steps[0].step === null;
  chooseStep();
};

const chooseStep = () => {
  const source = sources[byId("source").value];
  const { step, rows } = source.steps[byId("step").value];
  byId("step-name").textContent = step === null ? "" : `${step}`;
  byId("step").setAttribute("aria-valuetext", `step ${step}`);
  view.rows = rows.filter((row) =>
    Object.entries(FILTERS).every(([name, tests]) => (tests[byId(name).value] ?? (() => true))(row)));
  view.total = rows.length;
  show(0);
};

const show = async (index) => {
  const serial = ++view.serial;
  view.index = Math.max(0, Math.min(view.rows.length - 1, index));
  view.token = -1;
  const row = view.rows[view.index];
  const of = view.rows.length === view.total ? "" : ` (${view.total} without filters)`;
  byId("place").textContent = row ? `${view.index + 1} of ${view.rows.length}${of}` : `none of ${view.total}`;
  byId("previous").disabled = !row || view.index === 0;
  byId("next").disabled = !row || view.index === view.rows.length - 1;
  byId("detail").replaceChildren(view.hint);
  const content = row ? await unpack(row.data) : null;
  if (serial !== view.serial) return; // another one was chosen meanwhile
  view.content = content;
  byId("prompt-box").hidden = !content || !content.prompt;
  byId("prompt").textContent = content ? content.prompt : "";
  byId("facts").textContent = row ? describe(row) : "";
  const known = content ? Object.keys(content.stats ?? {}).filter((name) => name in STATS) : [];
  const before = byId("stat").value;
  byId("stat").replaceChildren(...known.map((name) => new Option(STATS[name].title, name)));
  if (known.includes(before)) byId("stat").value = before;
  byId("stat-label").hidden = !known.length;
  byId("tokens").replaceChildren(...(content ? content.texts : []).map(makeToken));
  byId("tokens").scrollTop = 0;
  colour();
};

const describe = (row) => {
  const parts = [];
  if (row.id !== undefined) parts.push(`${row.id}`);
  if (row.outcome !== undefined) parts.push(row.outcome.replaceAll("_", " "));
  if (row.answer !== undefined) parts.push(`wanted ${row.answer}`);
  if (row.length) parts.push(`${row.length} tokens`);
  if (row.finish) parts.push(row.finish === "length" ? "truncated" : "finished");
  if (row.thinking !== undefined) parts.push(row.thinking ? "think" : "no think");
  if (row.reward !== undefined) parts.push(`reward ${Number(row.reward.toPrecision(3))}`);
  if (row.kl !== undefined) parts.push(`mean reverse KL ${row.kl}`);
  return parts.join(" \u00b7 ");
};

const makeToken = (text, index) => {
  const node = make("span", text === "" ? "\u00b7" : text.replaceAll("\n", "\u23ce\n"));
  node.dataset.index = index;
  return node;
};

const findLevel = (name, value) => {
  if (value === null || value === undefined) return 0;
  const { levels, sign } = STATS[name];
  const size = name === "advantage" ? Math.abs(value) : sign * value;
  return levels.filter((level) => size >= 1000 * level).length;
};

const colour = () => {
  const name = byId("stat").value;
  const values = view.content && name ? view.content.stats[name] : [];
  for (const node of byId("tokens").children) {
    const level = findLevel(name, values[node.dataset.index]);
    node.className = `${level ? `k${level}` : ""}${node.dataset.index == view.token ? " on" : ""}`;
  }
  const scale = byId("scale");
  scale.replaceChildren();
  if (!values.length) return;
  scale.append(make("span", `${STATS[name].title}, nats:`));
  STATS[name].levels.forEach((x, i) => scale.append(make("span", `\u2265 ${x}`, `k${i + 1}`)));
};

const toNats = (value) => (value === null || value === undefined ? "unknown" : `${value / 1000}`);
const toPercent = (p) => `${(100 * p).toPrecision(3)}%`;

const choose = (index, reveal) => {
  const nodes = byId("tokens").children;
  if (!view.content || !(index >= 0 && index < nodes.length)) return;
  nodes[view.token]?.classList.remove("on");
  view.token = index;
  nodes[index].classList.add("on");
  if (reveal) nodes[index].scrollIntoView({ block: "nearest" });
  const { texts, tokens, stats } = view.content;
  const quote = JSON.stringify(texts[index].slice(0, 80));
  const head = make("p");
  head.append(make("b", texts[index] === "" ? "(part of the character before)" : quote));
  if (tokens) head.append(` token ${tokens[index]}, number ${index + 1}`);
  const table = make("table");
  const add = (name, value) => {
    const line = make("tr");
    line.append(make("td", name), make("td", value));
    table.append(line);
  };
  for (const [name, values] of Object.entries(stats ?? {})) {
    const value = values[index];
    const isLogp = name.endsWith("logp") && typeof value === "number";
    if (isLogp) add(name === "logp" ? "p, student" : "p, teacher", toPercent(Math.exp(value / 1000)));
    else add(STATS[name]?.title ?? name, toNats(value));
  }
  const tops = make("div", "", "tops");
  for (const side of ["student", "teacher"]) {
    const top = view.content[`${side}_top`];
    if (top) tops.append(makeTop(side, top[0][index], top[1][index], tokens[index]));
  }
  byId("detail").replaceChildren(head, table, tops);
};

const makeTop = (side, ids, thousandths, drawn) => {
  const table = make("table");
  table.append(make("caption", `likeliest, ${side}`));
  ids.forEach((id, i) => {
    const text = view.content.top_texts?.[id];
    const line = make("tr", "", id === drawn ? "drawn" : "");
    line.append(make("td", text === undefined ? `\u27e8${id}\u27e9` : JSON.stringify(text.slice(0, 40))));
    line.append(make("td", `${thousandths[i] / 10}%`));
    table.append(line);
  });
  return table;
};

const findFork = (step) => {
  const name = byId("stat").value;
  const values = view.content?.stats?.[name] ?? [];
  for (let i = view.token + step; i >= 0 && i < values.length; i += step) {
    if (findLevel(name, values[i]) >= FORK) return i;
  }
  return -1;
};

// Where the reader is, for a page that is loaded again.
const CONTROLS = ["source", "step", "right", "finish", "mode", "stat"];

const readPlace = () => ({
  scroll: scrollY,
  open: [...document.querySelectorAll("details")].map((node) => node.open),
  controls: Object.fromEntries(CONTROLS.map((id) => [id, byId(id)?.value])),
  isLast: byId("step")?.value === byId("step")?.max,
  index: view.index,
  token: view.token,
});

const restorePlace = async (place) => {
  if (place.scroll === undefined) return;
  document.querySelectorAll("details").forEach((node, i) => { node.open = Boolean(place.open[i]); });
  if (byId("viewer") && sources[place.controls.source]) {
    for (const id of ["source", "right", "finish", "mode"]) byId(id).value = place.controls[id];
    chooseSource();
    if (!place.isLast) byId("step").value = place.controls.step;
    chooseStep();
    await show(place.index);
    if ([...byId("stat").options].some((x) => x.value === place.controls.stat)) {
      byId("stat").value = place.controls.stat;
    }
    choose(place.token, false);
    colour();
  }
  scrollTo(0, place.scroll);
};

if (byId("viewer")) {
  view.hint = byId("detail").firstElementChild;
  byId("source").append(...sources.map((source, i) => new Option(source.name, i)));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("source").addEventListener("change", chooseSource);
  for (const id of ["right", "finish", "mode"]) byId(id).addEventListener("change", chooseStep);
  byId("step").addEventListener("input", chooseStep);
  byId("stat").addEventListener("change", colour);
  byId("previous").addEventListener("click", () => show(view.index - 1));
  byId("next").addEventListener("click", () => show(view.index + 1));
  for (const kind of ["pointerover", "click"]) {
    byId("tokens").addEventListener(kind, (event) => {
      if (event.target.dataset.index) choose(Number(event.target.dataset.index), false);
    });
  }
  byId("tokens").addEventListener("keydown", (event) => {
    const last = byId("tokens").children.length - 1;
    const to = {
      ArrowLeft: () => view.token - 1, ArrowRight: () => view.token + 1, Home: () => 0,
      End: () => last, n: () => findFork(1), p: () => findFork(-1),
    }[event.key];
    if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(to(), true);
  });
  chooseSource();
}
