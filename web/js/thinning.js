// Curves with more points than pixels: drawn with fewer points, and paler, so that what lies over them stays readable.

const COLUMN = 2; // px
const [DARK, PALE] = [0.4, 0.13]; // alpha

/**
 * The places `[x, y]` of a curve, ascending in x, without those that cannot be seen.
 *
 * Of each column of pixels the first, the lowest, the highest and the last remain, in their order.
 */
export function thinned(places, column = COLUMN) {
  const kept = [];
  for (let start = 0, end; start < places.length; start = end) {
    const edge = Math.floor(places[start][0] / column);
    for (end = start + 1; end < places.length && Math.floor(places[end][0] / column) === edge; ) end += 1;
    const inside = Array.from({ length: end - start }, (_, index) => start + index);
    const by = (better) => inside.reduce((best, one) => (better(places[one][1], places[best][1]) ? one : best));
    const seen = new Set([start, by((one, best) => one < best), by((one, best) => one > best), end - 1]);
    for (const index of [...seen].sort((one, other) => one - other)) kept.push(places[index]);
  }
  return kept;
}

/** How opaque a curve of so many points is on so many pixels: the more points on a pixel, the paler. */
export function opacity(count, pixels) {
  return Math.max(PALE, DARK * Math.min(1, Math.sqrt(pixels / (2 * Math.max(1, count)))));
}
