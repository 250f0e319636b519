// What all pictures share: a panel with its heading, a table behind it, axes and the tip.

/** A section: heading, a sentence, its pictures, and the table behind them, made when opened. */
function panel(id, title, lead, body, table) {
  const parts = [h("h2", { id: `${id}-title` }, title), h("p", { class: "lead" }, lead), body];
  if (table) parts.push(behind(title, table));
  return h("section", { id, class: "panel", "aria-labelledby": `${id}-title` }, parts);
}

function behind(title, table) {
  const summary = h("summary", {}, "The same as a table");
  const details = h("details", { class: "behind" }, summary);
  const box = h("div", { class: "scroll", tabindex: 0, role: "region" });
  box.setAttribute("aria-label", `${title}, as a table`);
  const draw = () => details.open && fill(box, tableOf(table()));
  details.addEventListener("toggle", draw);
  watch(["report", "layer", "expert", "factor"], draw);
  details.append(box);
  return details;
}

/** {head: [...], rows: [[...]]} as a table; the first cell of a row is its heading. */
function tableOf({ head, rows }) {
  const cell = (value, column) =>
    column === 0 ? h("th", { scope: "row" }, value) : h("td", {}, value);
  return h("table", {},
    h("thead", {}, h("tr", {}, head.map((value) => h("th", { scope: "col" }, value)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((v, i) => cell(String(v), i))))));
}

/** A picture that scales with its box: draws again when the width changes. */
function picture(className, draw) {
  const box = h("div", { class: `picture ${className}` });
  let width = 0;
  const redraw = () => {
    if (width <= 0) return;
    const held = box.contains(document.activeElement);
    fill(box, draw(width));
    if (held) box.querySelector("[tabindex]")?.focus();
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now === width) return;
    width = now;
    redraw();
  }).observe(box);
  box.redraw = redraw;
  return box;
}

function svg(width, height, label, ...children) {
  const size = { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" };
  return s("svg", { ...size, "aria-label": label }, children);
}

const label = (x, y, text, attributes = {}) =>
  s("text", { x, y, class: "label", ...attributes }, text);

/** Which of the eight colours an expert has; beyond eight its number tells it. */
const hue = (expert) => `e${expert % 8}`;

/** A small square with an expert's number. */
function chip(expert, attributes = {}) {
  return h("span", { class: `chip ${hue(expert)}`, ...attributes }, String(expert));
}

const tip = () => document.getElementById("tip");

function showTip(anchor, ...children) {
  const box = fill(tip(), ...children);
  box.hidden = false;
  const around = anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = box;
  const left = clamp(around.left + around.width / 2 - width / 2, 8, innerWidth - width - 8);
  const above = around.top - height - 8;
  box.style.left = `${left}px`;
  box.style.top = `${above > 8 ? above : around.bottom + 8}px`;
}

function hideTip() {
  tip().hidden = true;
}

/** A rectangle at a place of the page, to hang a tip on. */
const spot = (x, y) => ({ getBoundingClientRect: () => new DOMRect(x - 1, y - 8, 2, 16) });
