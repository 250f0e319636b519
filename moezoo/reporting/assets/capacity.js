// What any capacity factor would have dropped; the policy was asked, the page only looks it up.

function capacityPanel() {
  const { factors } = state.report;
  const output = h("output", { for: "factor", id: "factor-value" });
  const slider = h("input", { type: "range", id: "factor", min: 0, max: factors.length - 1, step: 1,
    oninput: () => choose({ factor: Number(slider.value) }) });
  const back = h("button", { type: "button", onclick: () => choose({ factor: null }) }, "as it ran");
  const bars = picture("drops", drawDrops);
  const draw = () => {
    const index = state.factor ?? usualFactor();
    slider.value = index;
    slider.setAttribute("aria-valuetext", `capacity factor ${factors[index]}`);
    output.textContent = String(factors[index]);
    back.disabled = state.factor === null;
    bars.redraw();
  };
  watch(["report", "layer", "factor"], draw);
  draw();
  const control = h("div", { class: "control" },
    h("label", { for: "factor" }, "Capacity factor ", output), slider, back);
  const lead = "How many token-expert pairs a capacity factor would have dropped, layer by layer: " +
    "each layer's own policy was run again over the same proposals (the paper's where it drops " +
    "nothing). Moving the slider strikes those tokens in the text above.";
  return panel("capacity", "If capacity were different", lead, [control, bars], capacityTable);
}

function drawDrops(width) {
  const { layers, factors } = state.report;
  const factor = state.factor ?? usualFactor();
  const left = Math.min(width * 0.28, 12 + 7.2 * Math.max(...layers.map((l) => l.label.length)));
  const high = 22;
  const right = 112;
  const span = Math.max(width - left - right, 40);
  const rows = layers.map((layer, row) => {
    const y = row * high;
    const share = layer.droppedAt(factor);
    const now = row === state.layer ? "label now" : "label";
    const name = label(left - 8, y + high / 2, layer.label,
      { class: now, "text-anchor": "end", "dominant-baseline": "central" });
    if (share === null) return [name, label(left, y + 15, "nothing to drop")];
    return [name,
      s("rect", { class: "track", x: left, y: y + 4, width: span, height: high - 8, rx: 2 }),
      s("rect", { class: "dropbar", x: left, y: y + 4, width: span * share, height: high - 8, rx: 2 }),
      label(width, y + high / 2, `${percent(share)} (${count(layer.capacity.dropped[factor])})`,
        { "text-anchor": "end", "dominant-baseline": "central" })];
  });
  const text = `Share dropped by layer at capacity factor ${factors[factor]}`;
  return svg(width, layers.length * high + 2, text, rows);
}

function capacityTable() {
  const { layers, factors } = state.report;
  const known = layers.filter((layer) => layer.capacity);
  const head = ["factor", ...known.map((layer) => `${layer.label} (${layer.capacity.policy})`)];
  const rows = factors.map((factor, i) =>
    [factor, ...known.map((layer) => `${percent(layer.droppedAt(i))} (${layer.capacity.dropped[i]})`)]);
  return { head, rows };
}
