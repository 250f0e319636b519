// Layers by experts: how much each gets, who gets nothing, and where capacity ends.

const STEPS = [0.25, 0.5, 0.75, 1, 1.5, 2, 4]; // loads over the mean, at which the shade changes

const shade = (over) => STEPS.findIndex((limit) => over < limit) + 1 || STEPS.length + 1;

function loadsPanel() {
  const cursor = { layer: 0, expert: 0 };
  const map = picture("heatmap", (width) => heatmap(width, cursor));
  const bars = picture("bars", drawBars);
  const note = h("p", { class: "note" });
  const draw = () => {
    map.redraw();
    bars.redraw();
    note.textContent = barsNote();
  };
  watch(["report", "layer", "expert", "factor"], draw);
  draw();
  const lead = "Rows are layers, columns experts. The darker, the more of the layer's tokens an " +
    "expert gets; an even share is in the middle of the scale. A ring marks a dead expert, " +
    "which computed nothing; a notch one that wants more than the capacity has room for.";
  return panel("load", "Who gets how much", lead, [map, legend(), bars, note], loadTable);
}

/** Layout of the map: left margin, cell width and height. */
function grid(width) {
  const { layers } = state.report;
  const most = Math.max(...layers.map((layer) => layer.experts));
  const left = Math.min(width * 0.22, 8 + 7.2 * Math.max(...layers.map((l) => l.label.length)));
  const high = clamp(Math.round(420 / layers.length), 12, 30);
  return { left, wide: Math.min((width - left - 4) / most, 64), high, most };
}

function heatmap(width, cursor) {
  const { layers } = state.report;
  const place = grid(width);
  const height = layers.length * place.high + 22;
  const paths = Array.from({ length: STEPS.length + 2 }, () => []);
  const rings = [];
  const notches = [];
  layers.forEach((layer, row) => layer.load.forEach((_, e) => {
    const [x, y] = [place.left + e * place.wide, row * place.high];
    const gap = place.wide > 5 ? 1 : 0;
    const box = `M${x.toFixed(1)} ${y}h${(place.wide - gap).toFixed(1)}v${place.high - 1}` +
      `h${(gap - place.wide).toFixed(1)}z`;
    paths[shade(layer.loadOverMean(e))].push(box);
    if (layer.dead.includes(e)) rings.push(box);
    if (overCapacity(layer, e)) notches.push(`M${x.toFixed(1)} ${y}h6l-6 6z`);
  }));
  const names = layers.map((layer, row) => label(place.left - 6, (row + 0.5) * place.high,
    layer.label, { "text-anchor": "end", "dominant-baseline": "central",
      class: row === state.layer ? "label now" : "label" }));
  const every = place.wide * place.most < 200 || place.most > 16 ? Math.ceil(place.most / 8) : 1;
  const ticks = Array.from({ length: Math.ceil(place.most / every) }, (_, i) =>
    label(place.left + (i * every + 0.5) * place.wide, height - 6, i * every,
      { "text-anchor": "middle" }));
  const made = svg(width, height, mapLabel(),
    paths.map((boxes, i) => s("path", { d: boxes.join(""), class: `heat h${i}` })),
    s("path", { d: notches.join(""), class: "notch" }),
    s("path", { d: rings.join(""), class: "dead" }),
    frame(place, state.layer, state.expert), names, ticks);
  made.setAttribute("role", "application");
  made.setAttribute("aria-roledescription", "heatmap");
  made.setAttribute("tabindex", "0");
  listen(made, place, cursor);
  return made;
}

const mapLabel = () => `Load of ${plural(state.report.layers.length, "layer")} by expert. ` +
  "Arrow keys move, Enter chooses.";

function overCapacity(layer, e) {
  const slots = slotsNow(layer);
  return slots !== null && layer.load[e] > slots;
}

/** What one expert has room for over the whole text; the paper's factor until one is chosen. */
function slotsNow(layer) {
  if (!layer.capacity) return null;
  return layer.capacity.slots[state.factor ?? usualFactor()];
}

const usualFactor = () => state.report.factors.indexOf(1.25);

function frame(place, row, expert) {
  const x = expert === null ? 0 : expert * place.wide;
  const wide = expert === null ? layerNow().experts * place.wide : place.wide;
  return s("rect", { class: "frame", x: place.left + x - 0.5, y: row * place.high - 0.5,
    width: wide, height: place.high, rx: 2 });
}

function listen(made, place, cursor) {
  const at = (event) => {
    const around = made.getBoundingClientRect();
    const row = Math.floor((event.clientY - around.top) / place.high);
    const expert = Math.floor((event.clientX - around.left - place.left) / place.wide);
    const layer = state.report.layers[row];
    return layer && expert >= 0 && expert < layer.experts ? { layer, expert } : null;
  };
  made.addEventListener("mousemove", (event) => {
    const found = at(event);
    if (found) showTip(spot(event.clientX, event.clientY), cellText(found.layer, found.expert));
    else hideTip();
  });
  made.addEventListener("mouseleave", hideTip);
  made.addEventListener("click", (event) => {
    const found = at(event);
    if (found) choose({ layer: found.layer.index, expert: found.expert });
  });
  made.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = step[event.key];
    const { layers } = state.report;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose({ layer: cursor.layer, expert: cursor.expert });
    }
    if (!move) return;
    event.preventDefault();
    cursor.layer = clamp(cursor.layer + move[0], 0, layers.length - 1);
    cursor.expert = clamp(cursor.expert + move[1], 0, layers[cursor.layer].experts - 1);
    const around = made.getBoundingClientRect();
    const text = cellText(layers[cursor.layer], cursor.expert);
    showTip(spot(around.left + place.left + (cursor.expert + 0.5) * place.wide,
      around.top + (cursor.layer + 0.5) * place.high), text);
    say(text);
  });
  made.addEventListener("blur", hideTip);
}

function cellText(layer, e) {
  const dead = layer.dead.includes(e) ? ", dead" : "";
  const over = overCapacity(layer, e) ? ", over capacity" : "";
  return `${layer.label}, expert ${e}: ${percent(layer.loadShare(e))} of ` +
    `${count(layer.total)} pairs, ${short(layer.loadOverMean(e))} times an even share${dead}${over}`;
}

function legend() {
  const cells = [...STEPS, null].map((limit, i) => h("span", { class: "key" },
    h("i", { class: `swatch h${i + 1}` }), limit === null ? `${STEPS.at(-1)} and more` : `< ${limit}`));
  return h("p", { class: "legend" }, "Times an even share: ", cells);
}

/** The chosen layer's loads, with an even share and the capacity as lines. */
function drawBars(width) {
  const layer = layerNow();
  const slots = slotsNow(layer);
  const mean = layer.total / layer.experts;
  const [left, high, low] = [44, 26, 150];
  const most = Math.max(...layer.load, slots && slots < 3 * mean ? slots : 0, 1);
  const wide = (width - left - 4) / layer.experts;
  const y = (value) => low - ((low - high) * value) / most;
  const bars = layer.load.map((load, e) => s("rect", {
    class: `bar ${hue(e)} ${e === state.expert ? "chosen" : ""}`, x: left + e * wide + wide * 0.08,
    y: y(load), width: wide * 0.84, height: low - y(load),
    onclick: () => chooseExpert(e) },
  s("title", {}, cellText(layer, e))));
  const every = Math.ceil(layer.experts / Math.max(1, Math.floor((width - left) / 26)));
  const ticks = layer.load.map((_, e) => (e % every ? null
    : label(left + (e + 0.5) * wide, low + 15, e, { "text-anchor": "middle" })));
  const line = (value, name) => (value === null || value > most ? null
    : s("line", { x1: left, x2: width, y1: y(value), y2: y(value), class: name }));
  const title = label(0, 12, `Pairs by expert, ${layer.label}`, { class: "label title" });
  return svg(width, low + 22, `Load by expert in ${layer.label}`, title,
    label(left - 6, y(most), count(most), { "text-anchor": "end", "dominant-baseline": "hanging" }),
    label(left - 6, low, "0", { "text-anchor": "end" }), bars, ticks,
    line(mean, "even"), line(slots, "capacity"));
}

function barsNote() {
  const layer = layerNow();
  const slots = slotsNow(layer);
  const factor = state.report.factors[state.factor ?? usualFactor()];
  const room = slots === null ? "" : ` Dashed: capacity factor ${factor}, which has room for ` +
    `${count(slots)} over the whole text.`;
  return `Dotted: an even share, ${count(layer.total / layer.experts)}.${room}`;
}

function loadTable() {
  const { layers } = state.report;
  const most = Math.max(...layers.map((layer) => layer.experts));
  const head = ["layer", "dead", "MaxVio", "entropy, nats", ...Array.from({ length: most }, (_, e) => e)];
  const rows = layers.map((layer) => [layer.label, layer.dead.length, short(layer.max_violation),
    short(layer.entropy), ...layer.load.map(count)]);
  return { head, rows };
}
