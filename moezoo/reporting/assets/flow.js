// Where an expert's tokens go in the next layer.

const SHOWN = 10; // experts of a layer with a place of their own; the others share one
const GAP = 4;

function flowPanel() {
  const body = picture("flow", drawFlow);
  const note = h("p", { class: "note" });
  const draw = () => {
    body.redraw();
    note.textContent = flowNote(layerNow());
  };
  watch(["report", "layer", "expert"], draw);
  draw();
  const lead = "Columns are layers that read the same text, blocks their experts, bands the tokens " +
    "that go from one to the next (by first choice). Choose an expert to follow its tokens.";
  return panel("flow", "From layer to layer", lead, [body, note], flowTable);
}

function flowNote({ flow, label: name }) {
  if (!flow) return "";
  const listed = unpacked(flow.count).reduce((sum, value) => sum + value, 0);
  if (listed === flow.total) return "";
  return `Of ${name}, ${percent(1 - listed / flow.total)} of the tokens are in flows too small to draw.`;
}

/** The layers to draw: as many as fit, the chosen one among them. */
function columnsFor(width) {
  const chain = state.report.layers.filter((layer) => layer.text === layerNow().text);
  const room = clamp(Math.floor(width / 150), 2, 7);
  const here = chain.indexOf(layerNow());
  const first = clamp(here - Math.floor(room / 2), 0, Math.max(chain.length - room, 0));
  return chain.slice(first, first + room);
}

/** The blocks of a layer from top to bottom: its busiest experts by number, then all the others. */
function blocksOf(layer) {
  const order = layer.load.map((load, e) => ({ load, e })).sort((a, b) => b.load - a.load);
  const named = order.slice(0, layer.experts <= SHOWN + 1 ? layer.experts : SHOWN);
  if (state.expert !== null && state.expert < layer.experts && !named.some(({ e }) => e === state.expert)) {
    named[named.length - 1] = order.find(({ e }) => e === state.expert);
  }
  const experts = named.map(({ e }) => e).sort((a, b) => a - b);
  return experts.length < layer.experts ? [...experts, -1] : experts;
}

/** Flows of a layer as {from, into, count} between blocks; -1 is the others. */
function flowsOf(layer, from, into) {
  const [a, b, n] = ["from", "into", "count"].map((name) => unpacked(layer.flow[name]));
  const sums = new Map();
  n.forEach((value, i) => {
    const key = `${from.includes(a[i]) ? a[i] : -1},${into.includes(b[i]) ? b[i] : -1}`;
    sums.set(key, (sums.get(key) ?? 0) + value);
  });
  return [...sums].map(([key, value]) => {
    const [x, y] = key.split(",").map(Number);
    return { from: x, into: y, count: value };
  });
}

function drawFlow(width) {
  const columns = columnsFor(width);
  if (columns.length < 2) return h("p", { class: "note" }, "No other layer reads this text.");
  const blocks = columns.map(blocksOf);
  const flows = columns.slice(0, -1).map((layer, i) => flowsOf(layer, blocks[i], blocks[i + 1]));
  const most = Math.max(...blocks.map((list) => list.length));
  const [top, high, thick] = [22, Math.max(220, most * 26), 30];
  const step = (width - thick - 2) / (columns.length - 1);
  const total = Math.max(...columns.slice(0, -1).map((layer) => layer.flow.total), 1);
  const scale = (high - (most - 1) * GAP) / total;
  const places = blocks.map((list, i) => placed(list, i, flows, scale, top));
  const bands = flows.map((list, i) => bandsOf(list, places[i], places[i + 1],
    1 + i * step + thick, 1 + (i + 1) * step, scale));
  const boxes = places.map((place, i) => [...place].map(([e, { y, size }]) =>
    block(columns[i], e, 1 + i * step, y, thick, Math.max(size * scale, 1))));
  const names = columns.map((layer, i) => label(
    i === 0 ? 0 : i === columns.length - 1 ? width : 1 + i * step + thick / 2, 12, layer.label,
    { class: layer.index === state.layer ? "label now" : "label",
      "text-anchor": i === 0 ? "start" : i === columns.length - 1 ? "end" : "middle" }));
  const text = `Flow of tokens through ${columns.map((layer) => layer.label).join(", ")}`;
  return svg(width, top + high + 4, text, bands, boxes, names);
}

/** Where each block begins and how many tokens it holds; `left` and `right` fill up as bands come. */
function placed(list, i, flows, scale, top) {
  const sum = (found, side, e) => (found ?? []).reduce((all, f) => all + (f[side] === e ? f.count : 0), 0);
  let y = top;
  return new Map(list.map((e) => {
    const size = Math.max(sum(flows[i - 1], "into", e), sum(flows[i], "from", e));
    const made = { y, size, left: y, right: y };
    y += Math.max(size * scale, 1) + GAP;
    return [e, made];
  }));
}

function bandsOf(list, from, into, x0, x1, scale) {
  const order = [...list].sort((a, b) => from.get(a.from).y - from.get(b.from).y ||
    into.get(a.into).y - into.get(b.into).y);
  return order.map((flow) => {
    const [a, b] = [from.get(flow.from), into.get(flow.into)];
    const size = flow.count * scale;
    const [y0, y1] = [a.right, b.left];
    a.right += size;
    b.left += size;
    const half = (x0 + x1) / 2;
    const path = `M${x0} ${y0}C${half} ${y0} ${half} ${y1} ${x1} ${y1}v${size}` +
      `C${half} ${y1 + size} ${half} ${y0 + size} ${x0} ${y0 + size}z`;
    const followed = state.expert !== null && (flow.from === state.expert || flow.into === state.expert);
    const dim = state.expert !== null && !followed ? "faint" : "";
    const name = (e) => (e === -1 ? "others" : `expert ${e}`);
    return s("path", { class: `band ${flow.from < 0 ? "nobody" : hue(flow.from)} ${dim}`, d: path },
      s("title", {}, `${name(flow.from)} to ${name(flow.into)}: ${plural(flow.count, "token")}`));
  });
}

function block(layer, e, x, y, wide, high) {
  const chosen = e === state.expert ? "chosen" : "";
  const name = e < 0 ? "\u2026" : String(e);
  return s("g", { class: `block ${e < 0 ? "nobody" : hue(e)} ${chosen}`,
    onclick: () => e >= 0 && chooseExpert(e) },
  s("rect", { x, y, width: wide, height: high, rx: 2 }),
  high > 10 ? label(x + wide / 2, y + high / 2, name,
    { "text-anchor": "middle", "dominant-baseline": "central", class: "label inside" }) : null);
}

function flowTable() {
  const layer = layerNow();
  if (!layer.flow) return { head: ["from", "into", "tokens"], rows: [] };
  const [a, b, n] = ["from", "into", "count"].map((name) => unpacked(layer.flow[name]));
  const next = state.report.layers[layer.flow.to].label;
  const rows = [...n].map((value, i) => [`expert ${a[i]}`, `expert ${b[i]}`, count(value)]);
  return { head: [layer.label, next, `tokens of ${count(layer.flow.total)}`], rows };
}
