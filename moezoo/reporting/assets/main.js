// The page, from the document that it carries.

/** The panels that a document has something for, in their order. */
function panelNames(report) {
  const routing = report.layers.length ? ["text", "load", "expert", "capacity", "flow"] : [];
  return [...routing, ...(report.run ? ["run"] : []), ...(report.pair ? ["pair"] : [])];
}

function build() {
  const { report } = state;
  const makers = { text: textPanel, load: loadsPanel, expert: expertPanel, capacity: capacityPanel,
    flow: flowPanel, run: runPanel, pair: pairPanel };
  fill(document.getElementById("head"), headOf(report));
  shownWords = null;
  fill(document.getElementById("panels"), report.layers.length ? controls() : null,
    panelNames(report).map((name) => makers[name]()));
  fill(document.getElementById("foot"), `Made by ${report.made_by}. Format ${report.format} ` +
    `${report.version}: the data of this page are JSON inside it.`);
}

state.report = read(JSON.parse(document.getElementById("moezoo-report").textContent));
build();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
addEventListener("scroll", hideTip, { passive: true });
if (state.report.live) goLive();
