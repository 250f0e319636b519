// Packed numbers: "u8:", "u16:", "u32:" or "bit:" and base64 of little-endian integers.

function bytesOf(base64) {
  const raw = atob(base64);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** The numbers of a packed text. In columns that may lack values, the largest one means none. */
function unpacked(text) {
  const mark = text.indexOf(":");
  const kind = text.slice(0, mark);
  const bytes = bytesOf(text.slice(mark + 1));
  if (kind === "u8") return bytes;
  if (kind === "bit") {
    const bits = new Uint8Array(bytes.length * 8);
    for (let i = 0; i < bits.length; i++) bits[i] = (bytes[i >> 3] >> (i & 7)) & 1;
    return bits;
  }
  const width = kind === "u16" ? 2 : 4;
  const view = new DataView(bytes.buffer);
  const read = width === 2 ? "getUint16" : "getUint32";
  const made = width === 2 ? Uint16Array : Uint32Array;
  return made.from({ length: bytes.length / width }, (_, i) => view[read](i * width, true));
}

const missing = (array) => 2 ** (8 * array.BYTES_PER_ELEMENT) - 1;
