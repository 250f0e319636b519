// The card of one expert: its tokens beyond chance, its share, how sure the router is, examples.

const AROUND = 6; // tokens on either side of an example
const EXAMPLES = 6;

function expertPanel() {
  const body = h("div", { class: "card" });
  const share = picture("share", drawShare);
  const sure = picture("sure", drawSure);
  const draw = () => {
    fill(body, cardHead(), h("div", { class: "columns" },
      h("div", {}, h("h3", {}, "Tokens beyond chance"), topList()),
      h("div", {}, h("h3", {}, "In context"), examples()),
      h("div", {}, h("h3", {}, "Share by layer"), share, h("h3", {}, "How sure the router is"), sure)));
    share.redraw();
    sure.redraw();
  };
  watch(["report", "layer", "expert"], draw);
  draw();
  const lead = "Lift says how many times as common a token is among this expert's tokens as in " +
    "the whole text. Tokens that were seen once do not lead: the list is picked by what a token " +
    "tells of the expert, and then ordered by lift.";
  return panel("expert", "One expert", lead, [body], expertTable);
}

function cardHead() {
  const [layer, e] = [layerNow(), expertNow()];
  const step = (by) => choose({ expert: (e + by + layer.experts) % layer.experts });
  const button = (text, name, by) =>
    h("button", { type: "button", "aria-label": name, onclick: () => step(by) }, text);
  const facts = `${percent(layer.loadShare(e))} of the layer's pairs, ` +
    `${short(layer.loadOverMean(e))} times an even share` +
    (layer.dead.includes(e) ? "; dead: it computed nothing" : "");
  return h("div", { class: "cardhead" },
    button("\u2039", "previous expert", -1), chip(e, { class: `chip big ${hue(e)}` }),
    button("\u203a", "next expert", 1),
    h("p", {}, h("strong", {}, `Expert ${e} of ${layer.label}`), h("br"), facts));
}

function topList() {
  const found = layerNow().top(expertNow());
  if (!found.length) return h("p", { class: "note" }, "None stands out.");
  const most = Math.max(...found.map(({ lift }) => lift));
  return h("ol", { class: "top" }, found.map(({ word, count: times, lift }) => {
    const bar = h("i", { class: `bar ${hue(expertNow())}` });
    bar.style.width = `${Math.max(2, (100 * lift) / most)}%`;
    return h("li", {}, h("bdi", { class: "word" }, visible(word)),
      h("span", { class: "lift" }, `${short(lift)}\u00d7`), h("span", { class: "track" }, bar),
      h("span", { class: "times" }, plural(times, "time")));
  }));
}

/** A word whose leading space can be seen to be missing: a piece inside a word begins with a dot. */
function visible(word) {
  const bare = word.trim();
  if (!bare) return "\u2423";
  return word.startsWith(" ") || bare.startsWith("<") ? bare : `\u00b7${bare}`;
}

function examples() {
  const [layer, e] = [layerNow(), expertNow()];
  const found = [];
  let start = 0;
  for (const length of layer.text.sequences) {
    for (let t = start; t < start + length; t++) {
      const mine = layer.choices(t, null).find(({ expert }) => expert === e);
      if (mine) found.push({ t, share: mine.share, from: start, end: start + length });
    }
    start += length;
  }
  if (!found.length) return h("p", { class: "note" }, "No token of the text shown goes here.");
  const step = Math.max(1, Math.floor(found.length / EXAMPLES)); // all over the text, not its start
  const chosen = found.filter((_, i) => i % step === 0).slice(0, EXAMPLES);
  return h("ul", { class: "examples" }, chosen.map(({ t, from, end }) => {
    const parts = [];
    for (let i = Math.max(from, t - AROUND); i < Math.min(end, t + AROUND + 1); i++) {
      const word = layer.text.word(i);
      if (word.startsWith(" ")) parts.push(" ");
      const shown = h("bdi", {}, word.trim() || "\u00a0");
      parts.push(i === t ? h("mark", { class: hue(e) }, shown) : shown);
    }
    return h("li", { dir: "auto" }, parts);
  }));
}

function drawShare(width) {
  const e = expertNow();
  const found = state.report.layers.filter((layer) => e < layer.experts);
  const most = Math.max(...found.map((layer) => layer.loadShare(e)), 1e-9);
  const wide = width / found.length;
  const bars = found.map((layer, i) => {
    const high = (80 * layer.loadShare(e)) / most;
    const now = layer.index === state.layer ? "chosen" : "";
    const text = `${layer.label}: ${percent(layer.loadShare(e))}`;
    return s("rect", { class: `bar ${hue(e)} ${now}`, x: i * wide + 1, y: 96 - high,
      width: Math.max(wide - 2, 1), height: high, onclick: () => chooseLayer(layer.index) },
    s("title", {}, text));
  });
  const end = found.at(-1);
  return svg(width, 114, `Share of expert ${e} by layer`, bars,
    label(0, 10, `${percent(most)} at most`), label(0, 110, found[0].label),
    found.length > 1 ? label(width, 110, end.label, { "text-anchor": "end" }) : null);
}

function drawSure(width) {
  const [layer, e] = [layerNow(), expertNow()];
  const bins = [...layer.bins(e)];
  const most = Math.max(...bins, 1);
  const wide = width / bins.length;
  const bars = bins.map((value, i) => {
    const high = (80 * value) / most;
    return s("rect", { class: `bar ${hue(e)}`, x: i * wide + 1, y: 96 - high, width: wide - 2,
      height: high }, s("title", {}, `${i / 10} to ${(i + 1) / 10}: ${plural(value, "pair")}`));
  });
  const name = layer.confidence_is;
  return svg(width, 114, `Pairs of expert ${e} by ${name}`, bars, label(0, 10, `${count(most)} at most`),
    label(0, 110, "0"), label(width / 2, 110, name, { "text-anchor": "middle" }),
    label(width, 110, "1", { "text-anchor": "end" }));
}

function expertTable() {
  const [layer, e] = [layerNow(), expertNow()];
  const bins = [...layer.bins(e)].map((value, i) =>
    [`${layer.confidence_is} ${i / 10} to ${(i + 1) / 10}`, count(value), ""]);
  const top = layer.top(e).map(({ word, count: times, lift }) => [visible(word), times, short(lift)]);
  const shares = state.report.layers.filter((other) => e < other.experts)
    .map((other) => [other.label, other.load[e], percent(other.loadShare(e))]);
  return { head: [`expert ${e}`, "pairs", "lift or share"], rows: [...top, ...shares, ...bins] };
}
