// The curve of a training run on a canvas: losses, learning rate and the samples' likeness. Independent of ComfyUI.

import { likenessByStep, mostAlike } from "./run_data.js";
import { opacity, thinned } from "./thinning.js";
import { say } from "./words.js";

export const ALIKE = "#3f9e6b"; // the colour of likeness
const COLOURS = { smoothed: "#4a8fe7", rate: "#e08a2e" }; // readable on light and dark backgrounds
const MARGIN = { left: 46, right: 10, top: 16, bottom: 18 };

export const FONT = "11px system-ui, sans-serif";

/** Draw axes, both losses, the learning rate, the likeness where it was measured, and a legend. */
export function plot(pen, { points, steps, samples }, { width, height, ink, pale }) {
  const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
  const end = lastStep(points.at(-1)[0], steps ?? 0);
  const [low, high] = lossRange(points);
  const highestRate = Math.max(...points.map(([, , , rate]) => rate ?? 0));
  const x = (step) => left + ((step - 1) / (end - 1)) * (right - left);
  const y = (loss) => Math.min(bottom, Math.max(top, bottom - ((loss - low) / (high - low)) * (bottom - top)));

  pen.lineWidth = 1;
  line(pen, [[left, bottom], [right, bottom]], pale, { alpha: 0.5 });
  for (const [value, words] of ticks(low, high)) {
    line(pen, [[left, y(value)], [right, y(value)]], pale, { alpha: 0.25 });
    label(pen, words, left - 5, y(value) + 4, pale, "right");
  }
  label(pen, "1", left, height - 4, pale, "left");
  label(pen, end < steps ? say("chart.step", { step: end, steps }) : say("plot.step", { step: end }), right, height - 4, pale, "right");

  const raw = points.filter((p) => p[1] !== null).map((p) => [x(p[0]), y(p[1])]);
  line(pen, thinned(raw), ink, { alpha: opacity(raw.length, right - left) });
  if (highestRate > 0) {
    const rates = points.filter((p) => p[3] !== null);
    line(pen, rates.map((p) => [x(p[0]), bottom - (p[3] / highestRate) * (bottom - top) * 0.95]), COLOURS.rate, { dash: [4, 3] });
  }
  line(pen, points.filter((p) => p[2] !== null).map((p) => [x(p[0]), y(p[2])]), COLOURS.smoothed, { thick: 2 });
  const alike = likenessByStep(samples);
  if (alike.length) drawLikeness(pen, alike, (step) => Math.max(left, x(step)), { top, bottom, right });

  legend(pen, curves(ink, alike.length), highestRate, { left, right, ink });
}

/** The right end of the axis: the whole run, or while it has few steps a half, a quarter, ... of it that holds them. */
export function lastStep(step, steps) {
  let end = Math.max(step, steps, 2);
  while (end / 2 >= Math.max(1.05 * step, 10)) end /= 2;
  return Math.ceil(end);
}

/** The names of the curves; if there is room, with the scale of the learning rate, which has no axis of its own. */
function legend(pen, names, highestRate, { left, right, ink }) {
  const scaled = names.map(([name, colour]) =>
    colour === COLOURS.rate && highestRate > 0 ? [say("plot.highest", { name, x: highestRate.toExponential(1) }), colour] : [name, colour],
  );
  const width = (all) => all.reduce((sum, [name]) => sum + pen.measureText(name).width + 12, -12);
  let edge = left;
  for (const [name, colour] of width(scaled) <= right - left ? scaled : names) {
    label(pen, name, edge, 10, colour, "left", colour === ink ? 0.6 : 1);
    edge += pen.measureText(name).width + 12;
  }
}

/** Round values within a range, `[value, words]`, at most five. */
export function ticks(low, high) {
  const least = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(least));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least) ?? 10 * power;
  const digits = Math.max(0, -Math.floor(Math.log10(size) + 1e-9));
  const words = (value) => (digits > 5 || Math.abs(value) >= 1e5 ? value.toExponential(1) : value.toFixed(digits));
  const found = [];
  for (let number = Math.ceil(low / size); number * size <= high; number += 1) found.push([number * size, words(number * size)]);
  return found;
}

/** A curve of its own height, from the lowest to the highest likeness, with a ring and the value at the best. */
function drawLikeness(pen, alike, x, { top, bottom, right }) {
  const values = alike.map(([, value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [floor, ceiling] = [bottom - (bottom - top) * 0.15, top + (bottom - top) * 0.2];
  const y = (value) => (high > low ? floor - ((value - low) / (high - low)) * (floor - ceiling) : (floor + ceiling) / 2);
  const places = alike.map(([step, value]) => [x(step), y(value)]);
  line(pen, places, ALIKE, { thick: 1.5 });
  for (const place of places) line(pen, [place], ALIKE);
  const [step, value] = mostAlike(alike);
  pen.save();
  pen.strokeStyle = ALIKE;
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.arc(x(step), y(value), 5, 0, 2 * Math.PI);
  pen.stroke();
  pen.restore();
  const words = say("plot.best", { x: value.toFixed(2), step });
  const half = pen.measureText(words).width / 2;
  label(pen, words, Math.min(right - half, Math.max(MARGIN.left + half, x(step))), y(value) - 8, ALIKE, "center");
}

const curves = (ink, isAlike) => [
  [say("plot.loss"), ink],
  [say("plot.smoothed"), COLOURS.smoothed],
  [say("plot.rate"), COLOURS.rate],
  ...(isAlike ? [[say("plot.likeness"), ALIKE]] : []),
];

/** The range of the vertical axis: all smoothed losses, and the raw ones but for the highest two in a hundred. */
function lossRange(points) {
  const raw = points.map((p) => p[1]).filter((v) => v !== null).sort((a, b) => a - b);
  const smoothed = points.map((p) => p[2]).filter((v) => v !== null);
  const kept = raw.slice(0, Math.max(2, Math.ceil(raw.length * 0.98)));
  const all = [...kept, ...smoothed];
  if (!all.length) return [0, 1];
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const air = (high - low || Math.abs(high) || 1) * 0.05;
  return [low - air, high + air];
}

function line(pen, places, colour, { alpha = 1, thick = 1, dash = [] } = {}) {
  pen.save();
  pen.globalAlpha = alpha;
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = thick;
  pen.setLineDash(dash);
  pen.beginPath();
  places.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
  if (places.length === 1) pen.fillRect(places[0][0] - 1.5, places[0][1] - 1.5, 3, 3);
  pen.restore();
}

function label(pen, words, x, y, colour, align, alpha = 1) {
  pen.save();
  pen.globalAlpha = alpha;
  pen.fillStyle = colour;
  pen.textAlign = align;
  pen.fillText(words, x, y);
  pen.restore();
}
