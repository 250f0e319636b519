// Two models: how far their outputs are apart, their experts, and how alike they route.

function pairPanel() {
  const distances = picture("distances", drawDistances);
  const alike = picture("alike", drawAgreement);
  const verdict = h("p", { class: "verdict" });
  const draw = () => {
    const { pair } = state.report;
    fill(verdict, h("strong", {}, short(pair.error)), " relative error of the outputs, ",
      h("strong", {}, short(pair.largest)), " at most");
    distances.redraw();
    alike.redraw();
  };
  watch(["report", "layer", "expert"], draw);
  draw();
  const { pair } = state.report;
  const lead = `Against ${pair.name}, on the same text. At step 0 of an upcycling the error of the ` +
    "outputs is that of the conversion. Below, how far each expert of the chosen layer is from " +
    (pair.dense ? "the dense layer it came from" : "the same expert of the other model") +
    ", up to a factor, and from its siblings on average, as shares of its own length.";
  return panel("pair", "Beside another model", lead, [verdict, distances, alike], pairTable);
}

const pairLayer = () => state.report.pair.layers.find(({ layer }) => layer === layerNow().name);

/** Two strips of numbered dots over one axis: to the parent, to the siblings. */
function drawDistances(width) {
  const found = pairLayer();
  const strips = [["parent", found?.parent], ["siblings", found?.siblings]].filter(([, list]) => list);
  if (!strips.length) return h("p", { class: "note" }, "This layer's experts have no distances.");
  const most = Math.max(...strips.flatMap(([, list]) => list), 1e-6); // less is rounding
  const [left, right, high] = [70, 20, 92];
  const x = (value) => left + ((width - left - right) * value) / most;
  const rows = strips.map(([name, list], row) => {
    const middle = 26 + row * high + high / 2;
    const line = s("line", { class: "grid", x1: left, x2: width - right, y1: middle, y2: middle });
    const dots = list.map((value, e) => {
      const y = middle + ((e % 5) - 2) * 14;
      const chosen = e === state.expert ? "chosen" : "";
      return s("g", { class: `block ${hue(e)} ${chosen}`, onclick: () => chooseExpert(e) },
        s("title", {}, `expert ${e}: ${short(value)} from its ${name}`),
        s("circle", { cx: x(value), cy: y, r: 8 }),
        label(x(value), y, e, { class: "label inside", "text-anchor": "middle",
          "dominant-baseline": "central" }));
    });
    const text = label(left - 12, middle, name, { "text-anchor": "end", "dominant-baseline": "central" });
    return [line, text, dots];
  });
  const low = 26 + strips.length * high + 14;
  return svg(width, low + 6, `Distances of the experts of ${layerNow().label}`,
    label(0, 12, `Distance of each expert, ${layerNow().label}`, { class: "label title" }), rows,
    label(left, low, "0"), label(width - right, low, short(most), { "text-anchor": "end" }));
}

function drawAgreement(width) {
  const found = state.report.pair.layers.filter(({ agreement }) => agreement !== null);
  if (!found.length) {
    const text = "Routing is not compared: the other model has no experts in these layers.";
    return h("p", { class: "note" }, text);
  }
  const names = new Map(state.report.layers.map((layer) => [layer.name, layer]));
  const [left, high, right, top] = [Math.min(width * 0.3, 150), 22, 64, 24];
  const span = width - left - right;
  const rows = found.map(({ layer, agreement }, row) => [
    label(left - 8, top + (row + 0.5) * high, names.get(layer).label,
      { "text-anchor": "end", "dominant-baseline": "central" }),
    s("rect", { class: "track", x: left, y: top + row * high + 4, width: span, height: high - 8, rx: 2 }),
    s("rect", { class: "agreebar", x: left, y: top + row * high + 4, width: span * agreement,
      height: high - 8, rx: 2 }),
    label(width, top + (row + 0.5) * high, percent(agreement),
      { "text-anchor": "end", "dominant-baseline": "central" })]);
  return svg(width, top + found.length * high + 2, "Share of tokens with the same experts, by layer",
    label(0, 12, "Tokens with the same experts", { class: "label title" }), rows);
}

function pairTable() {
  const names = new Map(state.report.layers.map((layer) => [layer.name, layer]));
  const rows = state.report.pair.layers.flatMap(({ layer, agreement, parent, siblings }) => {
    const experts = (parent ?? siblings ?? []).map((_, e) => [
      `${names.get(layer).label}, expert ${e}`, "", short(parent?.[e]), short(siblings?.[e])]);
    const same = agreement === null ? "none" : percent(agreement);
    return [[names.get(layer).label, same, "", ""], ...experts];
  });
  return { head: ["layer or expert", "routed alike", "from its parent", "from its siblings"], rows };
}
