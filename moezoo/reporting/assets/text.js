// The text: every token in the colour of its expert, struck through where it was dropped.

const tokens = []; // the elements of the excerpt, by place
let shownWords = null; // what they spell, so that newer data of the same text only repaints them
let tokenNow = 0;

function textPanel() {
  const box = h("div", {
    class: "text", role: "listbox", "aria-multiselectable": "true", "aria-label": "Tokens",
    onclick: (event) => clicked(event.target.closest(".token")),
    onkeydown: textKeys,
    onfocusin: (event) => tellToken(event.target.closest(".token")),
    onfocusout: hideTip,
    onmouseover: (event) => tellToken(event.target.closest(".token")),
    onmouseout: hideTip,
  });
  const note = h("p", { class: "note" });
  const draw = () => {
    drawText(box);
    note.textContent = textNote();
  };
  watch(["report", "layer", "expert", "factor"], draw);
  draw();
  const lead = "Each token wears the colour and the number of the expert that the chosen layer " +
    "sends it to; the fainter, the less sure the router was. Click a token or an expert to see " +
    "its tokens alone. Left and right move through the text, up and down through the layers.";
  return panel("text", "The text, token by token", lead, [box, note], textTable);
}

function drawText(box) {
  const layer = layerNow();
  const { name, piece, sequences } = layer.text;
  const words = `${name} ${piece} ${sequences}`;
  if (shownWords !== words) writeTokens(box, layer);
  shownWords = words;
  box.classList.toggle("alone", state.expert !== null);
  box.setAttribute("aria-label", `Tokens and their experts, ${layer.label}`);
  tokens.forEach((element, t) => paint(element, layer, t));
}

function writeTokens(box, layer) {
  tokens.length = 0;
  tokenNow = 0;
  let t = 0;
  const lines = layer.text.sequences.map((length, number) => {
    const line = h("div", { role: "group", dir: "auto", class: "sequence" });
    line.setAttribute("aria-label", `sequence ${number + 1}`);
    for (const end = t + length; t < end; t++) {
      const word = layer.text.word(t);
      const shown = word.startsWith(" ") ? word.slice(1) : word;
      const inside = h("bdi", {}, shown || "\u00a0");
      const element = h("span", { role: "option", tabindex: -1 }, inside);
      element.place = t;
      element.kind = `token${word.startsWith(" ") ? " begins" : ""}${shown ? "" : " gap"}`;
      tokens.push(element);
      line.append(element, "\u200b");
    }
    return line;
  });
  fill(box, lines);
  if (tokens.length) tokens[0].tabIndex = 0;
}

function paint(element, layer, t) {
  const choices = layer.choices(t, state.factor);
  const [first] = choices;
  const mine = choices.some(({ expert }) => expert === state.expert);
  const shown = mine ? choices.find(({ expert }) => expert === state.expert) : first;
  const dropped = choices.length > 0 && choices.every((choice) => choice.dropped);
  const marks = `${mine ? " mine" : ""}${dropped ? " dropped" : ""}`;
  element.className = `${element.kind} ${shown ? hue(shown.expert) : "nobody"}${marks}`;
  element.dataset.expert = shown ? shown.expert : "\u2013";
  element.style.setProperty("--share", shown ? shown.share.toFixed(2) : "0");
  element.setAttribute("aria-selected", String(mine));
  element.setAttribute("aria-label", spoken(layer, t, shown, dropped));
}

function spoken(layer, t, shown, dropped) {
  const word = layer.text.word(t).trim() || "space";
  if (!shown) return `${word}, no expert`;
  const end = dropped ? ", dropped" : "";
  return `${word}, expert ${shown.expert}, ${percent(shown.share, 0)}${end}`;
}

function clicked(element) {
  if (!element) return;
  moveTo(element.place, false);
  const choice = layerNow().first(element.place);
  if (choice !== null) chooseExpert(choice);
}

function moveTo(place, focus = true) {
  if (tokens[tokenNow]) tokens[tokenNow].tabIndex = -1;
  tokenNow = clamp(place, 0, tokens.length - 1);
  tokens[tokenNow].tabIndex = 0;
  if (focus) tokens[tokenNow].focus();
}

function textKeys(event) {
  const element = event.target.closest(".token");
  const way = getComputedStyle(event.target.closest(".sequence") ?? event.target).direction;
  const ahead = way === "rtl" ? -1 : 1;
  const moves = {
    ArrowRight: () => moveTo(tokenNow + ahead),
    ArrowLeft: () => moveTo(tokenNow - ahead),
    Home: () => moveTo(0),
    End: () => moveTo(tokens.length - 1),
    ArrowUp: () => throughLayers(-1),
    ArrowDown: () => throughLayers(1),
    Enter: () => clicked(element),
    " ": () => clicked(element),
    Escape: () => choose({ expert: null }),
  };
  if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  moves[event.key]();
}

/** To another layer that reads the same text, on the same token. */
function throughLayers(step) {
  const same = state.report.layers.filter((layer) => layer.text === layerNow().text);
  const next = same[same.indexOf(layerNow()) + step];
  if (!next) return;
  chooseLayer(next.index);
  tellToken(tokens[tokenNow]);
  say(`${next.label}: ${tokens[tokenNow].getAttribute("aria-label")}`);
}

/** The tip of a token: its choices here, and its way through the layers. */
function tellToken(element) {
  if (!element) return;
  const layer = layerNow();
  const t = element.place;
  const choices = layer.choices(t, state.factor).map(({ expert, share, dropped }) =>
    h("span", { class: "choice" }, chip(expert), ` ${percent(share, 0)}${dropped ? " dropped" : ""}`));
  const way = state.report.layers.filter((other) => other.text === layer.text).map((other) => {
    const expert = other.first(t);
    const here = other === layer ? "here" : null;
    return expert === null ? h("span", { class: "chip nobody" }, "\u2013")
      : h("span", { class: `chip ${hue(expert)} ${here ?? ""}` }, String(expert));
  });
  const word = h("strong", {}, h("bdi", {}, layer.text.word(t).trim() || "space"));
  showTip(element, h("div", {}, word, " ", choices.length ? choices : "no expert"),
    way.length > 1 ? h("div", { class: "way" }, "through the layers ", way) : null);
}

function textNote() {
  const layer = layerNow();
  const { shown, tokens: all } = layer.text;
  const parts = [shown < all ? `The first ${count(shown)} of ${count(all)} tokens.`
    : `${count(all)} tokens.`];
  if (layer.kind === "soft") {
    parts.push("This layer mixes all experts softly; shown is the one with the largest part.");
  }
  if (layer.confidence_is === "weight") parts.push("Shares are the pairs' weights.");
  parts.push(state.factor === null || !layer.hasRanks()
    ? `Struck through: dropped as it ran (${percent(layer.dropped)}).`
    : `Struck through: what capacity factor ${state.report.factors[state.factor]} would drop.`);
  return parts.join(" ");
}

function textTable() {
  const layer = layerNow();
  const rows = tokens.map((_, t) => {
    const choices = layer.choices(t, state.factor);
    const names = choices.map(({ expert, share }) => `${expert} (${percent(share, 0)})`);
    const lost = choices.filter((choice) => choice.dropped).length;
    return [t, layer.text.word(t), names.join(", ") || "none", lost || ""];
  });
  return { head: ["place", "token", "experts", "dropped"], rows };
}
