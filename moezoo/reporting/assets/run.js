// A training run: small pictures over the same steps.

const CURVES = [
  ["loss", "Loss", short, null],
  ["dropped", "Dropped", percent, 0],
  ["max_violation", "MaxVio", short, 0],
  ["entropy", "Router entropy, nats", short, 0],
  ["dead", "Dead experts", short, 0],
];

function runPanel() {
  const charts = CURVES.map(([name, title, format, low]) => picture("chart", (width) => {
    const { run } = state.report;
    const curves = [{ name: "", y: run[name] }];
    if (name === "loss" && run.held_out.length) curves.push(heldOut(run));
    return lineChart(width, { title, x: run.step, curves, format, low });
  }));
  const strip = picture("chart wide", drawStrip);
  const note = h("ul", { class: "notes" });
  const draw = () => {
    charts.forEach((chart) => chart.redraw());
    strip.redraw();
    fill(note, state.report.run.warnings.map(({ step, text }) => h("li", {}, `step ${step}: ${text}`)));
    fill(lead, runLead(state.report.run));
  };
  const body = [h("div", { class: "multiples" }, charts, strip), note];
  const made = panel("run", "In training", "", body, runTable);
  const lead = made.querySelector(".lead");
  watch(["report"], draw);
  draw();
  return made;
}

const runLead = (run) => `${run.name}: ${plural(run.steps, "step")}` +
  (run.averaged > 1 ? `, each point the mean of ${run.averaged}` : "") +
  ". MaxVio is the largest load over the mean, minus 1, in the worst layer.";

function heldOut(run) {
  return { name: "held out", dots: true, x: run.held_out.map(([step]) => step),
    y: run.held_out.map(([, value]) => value) };
}

/** Dead experts by sparse layer over steps: a row a layer, the darker the more. */
function drawStrip(width) {
  const { run } = state.report;
  const layers = Object.keys(run.dead_by_layer);
  if (!layers.length) {
    const all = run.dead.every((value) => !value);
    const text = all ? "No expert was dead in any step." : "The run did not say in which layers.";
    return h("p", { class: "note" }, `Dead experts by layer: ${text}`);
  }
  const [left, top, high] = [110, 24, 18];
  const most = Math.max(...layers.flatMap((layer) => run.dead_by_layer[layer]), 1);
  const wide = (width - left - 10) / run.step.length;
  const rows = layers.map((layer, row) => [
    label(left - 8, top + (row + 0.5) * high, `sparse layer ${layer}`,
      { "text-anchor": "end", "dominant-baseline": "central" }),
    run.dead_by_layer[layer].map((value, i) => (value ? s("rect", {
      class: `heat h${1 + Math.round((7 * value) / most)}`, x: left + i * wide, y: top + row * high,
      width: wide + 0.3, height: high - 2 },
    s("title", {}, `step ${run.step[i]}: ${short(value)} dead`)) : null))]);
  const title = label(0, 12, "Dead experts by layer", { class: "label title" });
  const end = label(width - 10, 12, `darkest: ${short(most)}`, { "text-anchor": "end" });
  return svg(width, top + layers.length * high + 4, "Dead experts by layer over steps", title, end, rows);
}

function runTable() {
  const { run } = state.report;
  const layers = Object.keys(run.dead_by_layer);
  const head = ["step", ...CURVES.map(([, title]) => title), ...layers.map((l) => `dead in ${l}`)];
  const rows = run.step.map((step, i) => [step,
    ...CURVES.map(([name, , format]) => format(run[name][i])),
    ...layers.map((layer) => short(run.dead_by_layer[layer][i]))]);
  const held = run.held_out.map(([step, value]) => [`${step}, held out`, short(value)]);
  return { head, rows: [...rows, ...held] };
}
