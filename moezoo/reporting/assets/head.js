// The top of the page: what this is, and the controls that all panels follow.

const CHIPS = 32; // experts that get a button each

function headOf(report) {
  const layers = report.layers.length;
  const tokensSeen = report.streams.reduce((sum, stream) => sum + stream.tokens, 0);
  const experts = [...new Set(report.layers.map((layer) => layer.experts))].sort((a, b) => a - b);
  const size = experts.length > 1 ? `${experts[0]} to ${experts.at(-1)}` : String(experts[0]);
  const facts = !layers ? "A training run."
    : `${plural(layers, "layer")} of ${size} ${experts.at(-1) === 1 ? "expert" : "experts"}, ` +
      `${plural(tokensSeen, "token")}.` +
      (report.dense ? " The model is dense: every MLP is one expert that takes every token." : "");
  const parts = [h("h1", {}, h("bdi", {}, report.title)), h("p", { class: "facts" }, facts)];
  if (report.live) parts.push(h("p", { id: "live", class: "live" }, "live"));
  if (report.notes.length) {
    const list = h("ul", { class: "notes" }, report.notes.map((note) => h("li", {}, note)));
    const title = `What stands out: ${plural(report.notes.length, "finding")}`;
    parts.push(report.notes.length < 4 ? list
      : h("details", { class: "found" }, h("summary", {}, title), list));
  }
  return parts;
}

function controls() {
  const output = h("output", { for: "layer", id: "layer-name" });
  const slider = h("input", { type: "range", id: "layer", min: 0, step: 1,
    oninput: () => chooseLayer(Number(slider.value)) });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Experts" });
  const bar = h("div", { class: "controls", role: "region", "aria-label": "Layer and expert" },
    h("div", { class: "control" }, h("label", { for: "layer" }, "Layer ", output), slider, playButton()),
    chips);
  const draw = () => {
    slider.max = state.report.layers.length - 1;
    slider.value = state.layer;
    slider.setAttribute("aria-valuetext", layerNow().label);
    output.textContent = layerNow().label;
    bar.classList.toggle("single", state.report.layers.length === 1);
    drawChips(chips);
  };
  watch(["report", "layer", "expert"], draw);
  draw();
  return bar;
}

/** A button an expert; of more than `CHIPS` the busiest, and a field for any. */
function drawChips(box) {
  const layer = layerNow();
  const focused = document.activeElement?.dataset?.chip;
  const order = layer.load.map((load, e) => ({ load, e })).sort((a, b) => b.load - a.load);
  const shown = order.slice(0, layer.experts > CHIPS ? CHIPS / 2 : CHIPS).map(({ e }) => e);
  if (state.expert !== null && !shown.includes(state.expert)) shown.push(state.expert);
  const button = (text, e, name) => h("button", { type: "button", "data-chip": String(e),
    class: e === null ? "chip all" : `chip ${hue(e)}`, "aria-pressed": String(state.expert === e),
    "aria-label": name, onclick: () => (e === null ? choose({ expert: null }) : chooseExpert(e)) }, text);
  const buttons = shown.sort((a, b) => a - b).map((e) => button(String(e), e,
    `expert ${e}, ${percent(layer.loadShare(e))}`));
  const any = layer.experts <= CHIPS ? null : h("label", { class: "any" }, "any ", h("input", {
    type: "number", min: 0, max: layer.experts - 1, value: state.expert ?? "",
    onchange: (event) => choose({ expert: event.target.value === "" ? null
      : clamp(Math.round(Number(event.target.value)), 0, layer.experts - 1) }) }));
  fill(box, button("all", null, "all experts"), buttons, any);
  if (focused !== undefined) box.querySelector(`[data-chip="${focused}"]`)?.focus();
}

/** Steps through the layers, one after another, until the last one or a second press. */
function playButton() {
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  };
  const step = () => {
    if (state.layer === state.report.layers.length - 1) stop();
    else chooseLayer(state.layer + 1);
  };
  const button = h("button", { type: "button", class: "play", onclick: () => {
    if (timer) return stop();
    if (state.layer === state.report.layers.length - 1) chooseLayer(0);
    timer = setInterval(step, 900);
    button.textContent = "Stop";
    return undefined;
  } }, "Play");
  return button;
}
