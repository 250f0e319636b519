// A small chart of lines over steps.

/**
 * An SVG of curves over x. options: {title, x: [...], curves: [{name, y: [...], dots}], format, low}.
 */
function lineChart(width, { title, x, curves, format = short, low = null }) {
  const high = 150;
  const [left, right, top, bottom] = [50, 10, 24, 22];
  const values = curves.flatMap(({ y }) => y).filter((value) => value !== null);
  if (!values.length) return svg(width, high, `${title}: no values`, label(0, 12, title));
  const least = low ?? Math.min(...values);
  const most = Math.max(...values) > least ? Math.max(...values) : least + 1;
  const xs = curves.flatMap((curve) => curve.x ?? x);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const px = (value) => left + ((width - left - right) * (value - first)) / Math.max(last - first, 1);
  const py = (value) => high - bottom - ((high - top - bottom) * (value - least)) / (most - least);
  const lines = curves.map((curve, i) => drawnCurve(curve, curve.x ?? x, px, py, i));
  const end = curves.map(({ name, y }) => `${name} ${format(y.findLast((v) => v !== null) ?? null)}`);
  const names = [label(0, 12, title, { class: "label title" }),
    label(width - right, 12, end.join(", "), { "text-anchor": "end" })];
  const axis = (value) => [
    s("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
    label(left - 6, py(value), format(value), { "text-anchor": "end", "dominant-baseline": "central" })];
  const cross = s("line", { class: "cross", y1: top, y2: high - bottom, visibility: "hidden" });
  const made = svg(width, high, `${title}: ${end.join(", ")} at step ${last}`, axis(least), axis(most),
    label(left, high - 4, count(first)),
    label(width - right, high - 4, `step ${count(last)}`, { "text-anchor": "end" }), lines, names, cross);
  follow(made, cross, { x, curves, px, format, title });
  return made;
}

function drawnCurve({ y, dots }, x, px, py, i) {
  if (dots) {
    return y.map((value, j) => s("circle", { class: `dot c${i}`, cx: px(x[j]), cy: py(value), r: 3 }));
  }
  let path = "";
  let pen = false;
  y.forEach((value, j) => {
    if (value !== null) path += `${pen ? "L" : "M"}${px(x[j]).toFixed(1)} ${py(value).toFixed(1)}`;
    pen = value !== null;
  });
  return s("path", { class: `line c${i}`, d: path });
}

/** A line under the pointer, and the values there. */
function follow(made, cross, { x, curves, px, format, title }) {
  made.addEventListener("mousemove", (event) => {
    const at = event.clientX - made.getBoundingClientRect().left;
    const distances = x.map((value) => Math.abs(px(value) - at));
    const j = distances.indexOf(Math.min(...distances));
    cross.setAttribute("x1", px(x[j]));
    cross.setAttribute("x2", px(x[j]));
    cross.setAttribute("visibility", "visible");
    const values = curves.filter(({ dots }) => !dots).map(({ y }) => format(y[j]));
    showTip(spot(event.clientX, event.clientY), `step ${count(x[j])}: ${title} ${values.join(", ")}`);
  });
  made.addEventListener("mouseleave", () => {
    cross.setAttribute("visibility", "hidden");
    hideTip();
  });
}
