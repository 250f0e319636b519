// What the reader has chosen; every panel draws from it and nothing else.

/**
 * layer: index of a layer. expert: its number, or null for all. factor: index into the factors, or
 * null for what really was dropped. report: the document.
 */
const state = { report: null, layer: 0, expert: null, factor: null };
const watchers = [];

/** Call `draw(state)` whenever one of `names` changes. */
function watch(names, draw) {
  watchers.push({ names, draw });
}

function choose(changes) {
  const changed = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  if (!changed.length) return;
  Object.assign(state, changes);
  for (const { names, draw } of watchers) {
    if (names.some((name) => changed.includes(name))) draw(state);
  }
}

const layerNow = () => state.report.layers[state.layer];

function chooseLayer(index) {
  const layer = clamp(index, 0, state.report.layers.length - 1);
  const expert = state.expert < state.report.layers[layer].experts ? state.expert : null;
  choose({ layer, expert });
}

function chooseExpert(expert) {
  const now = state.expert === expert ? null : expert;
  choose({ expert: now });
  say(now === null ? "All experts" : `Expert ${now} alone`);
}

/** The expert of the card: the chosen one, or the busiest. */
function expertNow() {
  if (state.expert !== null) return state.expert;
  const { load } = layerNow();
  return load.indexOf(Math.max(...load));
}
