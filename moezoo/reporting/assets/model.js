// The document as the panels read it: packed columns are unpacked when somebody first looks.

/** Reads a document of the format moezoo.report; throws for another one. */
function read(raw) {
  if (raw.format !== "moezoo.report" || raw.version !== 1) {
    throw new Error(`a page of moezoo.report 1 cannot show ${raw.format} ${raw.version}`);
  }
  const streams = raw.streams.map(readStream);
  const layers = raw.layers.map((layer, index) => readLayer(layer, index, streams));
  return { ...raw, streams, layers };
}

function readStream(raw) {
  const column = lazy(() => (raw.piece ? unpacked(raw.piece) : null));
  const counts = lazy(() => (raw.counts ? unpacked(raw.counts) : null));
  return {
    ...raw,
    /** The text of token t, or its place where no ids are known. */
    word: (t) => (raw.pieces ? raw.pieces[column()[t]] : ` #${t}`),
    pieceText: (p) => raw.pieces[p],
    pieceShare: (p) => counts()[p] / Math.max(raw.tokens, 1),
  };
}

function readLayer(raw, index, streams) {
  const expert = lazy(() => unpacked(raw.expert));
  const share = lazy(() => unpacked(raw.share));
  const kept = lazy(() => unpacked(raw.kept));
  const rank = lazy(() => (raw.capacity?.rank ? unpacked(raw.capacity.rank) : null));
  const bins = lazy(() => unpacked(raw.confidence_bins));
  const top = lazy(() => ({ piece: unpacked(raw.top.piece), count: unpacked(raw.top.count) }));
  const k = raw.choices;
  const layer = {
    ...raw,
    index,
    text: streams[raw.stream],
    total: raw.load.reduce((sum, load) => sum + load, 0),
    /** The choices of token t, the likeliest first: {expert, share, dropped}. */
    choices(t, factor) {
      const found = [];
      for (let j = t * k; j < (t + 1) * k; j++) {
        if (expert()[j] === missing(expert())) continue;
        found.push({ expert: expert()[j], share: share()[j] / 255, dropped: dropped(j, factor) });
      }
      return found;
    },
    first: (t) => (expert()[t * k] === missing(expert()) ? null : expert()[t * k]),
    loadShare: (e) => raw.load[e] / Math.max(layer.total, 1),
    loadOverMean: (e) => (raw.load[e] / Math.max(layer.total, 1)) * raw.experts,
    bins: (e) => bins().subarray(e * 10, e * 10 + 10),
    top: (e) => topOf(top(), e, layer, streams[raw.stream]),
    hasRanks: () => rank() !== null,
    droppedAt: (factor) =>
      raw.capacity ? raw.capacity.dropped[factor] / Math.max(raw.offered, 1) : null,
  };
  function dropped(j, factor) {
    if (factor === null || rank() === null) return !kept()[j];
    return rank()[j] > factor;
  }
  return layer;
}

/** The tokens that an expert gets beyond chance: {word, count, lift}. */
function topOf(top, e, layer, stream) {
  const width = top.piece.length / layer.experts;
  const pairs = layer.bins(e).reduce((sum, value) => sum + value, 0);
  const rows = [];
  for (let j = e * width; j < (e + 1) * width; j++) {
    if (!top.count[j]) continue;
    const share = top.count[j] / pairs;
    const lift = share / stream.pieceShare(top.piece[j]);
    rows.push({ word: stream.pieceText(top.piece[j]), count: top.count[j], lift });
  }
  return rows.sort((a, b) => b.lift - a.lift);
}

function lazy(make) {
  let made = false;
  let value;
  return () => {
    if (!made) [value, made] = [make(), true];
    return value;
  };
}
