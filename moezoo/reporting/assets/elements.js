// Making elements. Every text goes in as text, never as markup, whatever it holds.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, event handlers (`onclick`) and children (elements or text). */
function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace the children of an element. */
function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null));
  return element;
}

const percent = (share, digits = 1) =>
  share === null || Number.isNaN(share) ? "none" : `${(100 * share).toFixed(digits)} %`;

const count = (value) => Math.round(value).toLocaleString("en");

/** A number in a few digits: 0.00012 as 1.2e-4, 12345 as 12,345. */
function short(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  if (size >= 1000) return count(value);
  return String(Number(value.toPrecision(3)));
}

const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Tell a screen reader. */
function say(text) {
  document.getElementById("said").textContent = text;
}
