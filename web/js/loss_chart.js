// A chart of a training run: losses and learning rate on a canvas, the figures as text. Independent of ComfyUI.

const LIMIT = 4000; // points; beyond that neighbours are merged
const COLOURS = { smoothed: "#4a8fe7", rate: "#e08a2e" }; // readable on light and dark backgrounds
const FONT = "11px system-ui, sans-serif";
const MARGIN = { left: 46, right: 10, top: 16, bottom: 18 };
const PHASES = {
  starting: "Starting",
  preparing: "Preparing",
  selecting: "Selecting blocks",
  precomputing: "Precomputing",
  sampling: "Sampling",
  training: "Training",
  done: "Done",
  cancelled: "Cancelled",
  failed: "Stopped by an error",
  lost: "The server stopped",
};

export const MIN_HEIGHT = 190;

const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const text = (value) => (typeof value === "string" ? value.slice(0, 200) : "");
const count = (value) => Math.max(0, Math.trunc(number(value) ?? 0));

/** A run as sent by the server, or null if it is not a run. Unknown fields are dropped, invalid values become null. */
export function readRun(data) {
  if (!data || typeof data !== "object" || !text(data.run)) return null;
  const points = readPoints(data.points);
  return {
    run: text(data.run),
    node: text(data.node),
    workflow: text(data.workflow) || null,
    started: number(data.started) ?? 0,
    status: text(data.status) || "running",
    phase: text(data.phase),
    detail: text(data.detail),
    step: number(data.step),
    steps: number(data.steps),
    secondsPerStep: number(data.seconds_per_step),
    secondsLeft: number(data.seconds_left),
    memoryNow: number(data.memory_now),
    memoryPeak: number(data.memory_peak),
    memoryOf: text(data.memory_of),
    count: data.count === undefined ? count(data.first) + points.length : count(data.count),
    first: count(data.first),
    points,
  };
}

/** `[step, loss, smoothed, learning rate]` for every point that has a step; unknown values are null. */
function readPoints(points) {
  if (!Array.isArray(points)) return [];
  const rows = points.filter((point) => Array.isArray(point) && number(point[0]) !== null);
  return rows.map(([step, loss, smoothed, rate]) => [step, number(loss), number(smoothed), number(rate)]);
}

/** The run with the points of `news` appended. */
export function extended(run, news) {
  let points = [...run.points, ...news.points];
  if (points.length > LIMIT) {
    const last = points.at(-1);
    points = points.filter((_, index) => index % 2 === 0);
    if (points.at(-1) !== last) points.push(last);
  }
  return { ...news, points };
}

/** An element that draws runs. */
export class LossChart {
  constructor() {
    this.run = null;
    this.note = "";
    this.element = make("div", {
      className: "blockskip-chart",
      style:
        `min-height:${MIN_HEIGHT}px;height:100%;width:100%;box-sizing:border-box;padding:6px 8px;display:flex;gap:3px;` +
        "flex-direction:column;overflow:hidden;pointer-events:none;border-radius:4px;font:11px/1.35 system-ui,sans-serif;" +
        "color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);border:1px solid var(--border-color,#4e4e4e)",
    });
    this.head = make("div", { style: "font-weight:600;white-space:nowrap;overflow:hidden;text-overflow:ellipsis" });
    const room = make("div", { style: "position:relative;flex:1 1 90px;min-height:90px" });
    this.canvas = make("canvas", { style: "position:absolute;inset:0;width:100%;height:100%" });
    this.canvas.setAttribute("role", "img");
    this.figures = make("div", { style: "white-space:pre-line;min-height:2.7em;color:var(--descrip-text,#999)" });
    room.append(this.canvas);
    this.element.append(this.head, room, this.figures);
    new ResizeObserver(() => this.redraw()).observe(room);
    this.redraw();
  }

  /** Show a run, or null for no run. */
  show(run) {
    this.run = run;
    this.redraw();
  }

  /** Show what a node before the trainer is doing; an empty text shows the run again. */
  announce(note) {
    this.note = note;
    this.redraw();
  }

  /** Draw before the next frame, once even if called several times. */
  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.draw();
    });
  }

  draw() {
    const { run, note } = this;
    this.head.textContent = note || (run ? headline(run) : "No run yet");
    this.figures.textContent = run ? figures(run) : "Loss, learning rate and memory appear here during training.";
    this.canvas.setAttribute("aria-label", `Loss of ${run?.points.length ?? 0} training steps`);
    Object.assign(this.element.dataset, { points: run?.points.length ?? 0, status: run?.status ?? "none", run: run?.run ?? "" });
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return; // not on the page
    // On ComfyUI's canvas the element is also scaled with the zoom.
    const zoom = this.canvas.getBoundingClientRect().width / width;
    const ratio = Math.min(4, window.devicePixelRatio * Math.max(1, zoom || 1));
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = FONT;
    const ink = getComputedStyle(this.element).color;
    const pale = getComputedStyle(this.figures).color;
    if (run?.points.length) plot(pen, run, { width, height, ink, pale });
  }
}

function make(tag, { className = "", style }) {
  const element = document.createElement(tag);
  element.className = className;
  element.style.cssText = style;
  return element;
}

function headline({ phase, detail, step, steps, secondsLeft }) {
  const parts = [PHASES[phase] ?? phase];
  if (detail) parts.push(detail);
  if (steps) parts.push(`step ${step ?? 0} of ${steps}`);
  if (secondsLeft !== null && phase === "training") parts.push(`${duration(secondsLeft)} left`);
  return parts.filter(Boolean).join(" · ");
}

function figures({ points, secondsPerStep, memoryNow, memoryPeak, memoryOf }) {
  const [, loss, smoothed, rate] = points.at(-1) ?? [];
  const first = [
    known(loss, (x) => `loss ${x.toFixed(4)}`),
    known(smoothed, (x) => `smoothed ${x.toFixed(4)}`),
    known(rate, (x) => `lr ${x.toExponential(2)}`),
    known(secondsPerStep, (x) => `${x.toPrecision(3)} s/it`),
  ];
  const second = [
    known(memoryNow, (x) => `memory ${bytes(x)} now`),
    known(memoryPeak, (x) => `peak ${bytes(x)}`),
    memoryNow === null ? "" : memoryOf,
  ];
  return [first, second].map((parts) => parts.filter(Boolean).join(" · ")).join("\n");
}

const known = (value, say) => (value === null || value === undefined ? "" : say(value));
const bytes = (x) => (x < 2 ** 30 ? `${(x / 2 ** 20).toFixed(0)} MiB` : `${(x / 2 ** 30).toFixed(2)} GiB`);

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Draw axes, both losses, the learning rate and a legend. */
function plot(pen, { points, steps }, { width, height, ink, pale }) {
  const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
  const end = Math.max(points.at(-1)[0], Math.min(steps ?? 0, points.at(-1)[0] * 4), 2);
  const [low, high] = lossRange(points);
  const highestRate = Math.max(...points.map(([, , , rate]) => rate ?? 0));
  const x = (step) => left + ((step - 1) / (end - 1)) * (right - left);
  const y = (loss) => Math.min(bottom, Math.max(top, bottom - ((loss - low) / (high - low)) * (bottom - top)));

  pen.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    const value = low + share * (high - low);
    line(pen, [[left, y(value)], [right, y(value)]], pale, { alpha: 0.25 });
    label(pen, value.toPrecision(3), left - 5, y(value) + 4, pale, "right");
  }
  label(pen, "1", left, height - 4, pale, "left");
  label(pen, `step ${end}`, right, height - 4, pale, "right");

  line(pen, points.filter((p) => p[1] !== null).map((p) => [x(p[0]), y(p[1])]), ink, { alpha: 0.4 });
  if (highestRate > 0) {
    const rates = points.filter((p) => p[3] !== null);
    line(pen, rates.map((p) => [x(p[0]), bottom - (p[3] / highestRate) * (bottom - top) * 0.95]), COLOURS.rate, { dash: [4, 3] });
  }
  line(pen, points.filter((p) => p[2] !== null).map((p) => [x(p[0]), y(p[2])]), COLOURS.smoothed, { thick: 2 });

  let edge = left;
  for (const [name, colour] of [["loss", ink], ["smoothed", COLOURS.smoothed], ["learning rate", COLOURS.rate]]) {
    label(pen, name, edge, 10, colour, "left", name === "loss" ? 0.6 : 1);
    edge += pen.measureText(name).width + 12;
  }
}

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
