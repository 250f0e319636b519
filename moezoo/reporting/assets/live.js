// While a run is watched: the newest document, once a second, from where the page came from.

const SECOND = 1000;

function goLive() {
  const address = new URL("data.json", location.href);
  address.search = location.search;
  const again = () => setTimeout(ask, SECOND);
  async function ask() {
    try {
      const answer = await fetch(address, { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      renew(read(await answer.json()));
      mark(`live, step ${count(state.report.run?.steps ?? 0)}`);
      again();
    } catch {
      mark("the run has ended or stopped; this is its last state");
    }
  }
  again();
}

function mark(text) {
  document.getElementById("live").textContent = text;
}

/** Take a newer document; panels that were not there before are made. */
function renew(report) {
  const before = panelNames(state.report).join();
  const layer = clamp(state.layer, 0, Math.max(report.layers.length - 1, 0));
  const same = panelNames(report).join() === before;
  if (same) {
    fill(document.getElementById("head"), headOf(report));
    choose({ report, layer });
  } else {
    Object.assign(state, { report, layer });
    watchers.length = 0;
    build();
  }
}
