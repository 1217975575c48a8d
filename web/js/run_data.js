// A training run as the page keeps it: read from what the server sends, extended by later news. Independent of ComfyUI.

const LIMIT = 4000; // points; beyond that neighbours are merged
const MOST_SAMPLES = 2000;

const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const text = (value, most = 200) => (typeof value === "string" ? value.slice(0, most) : "");
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
    done: number(data.done),
    total: number(data.total),
    message: text(data.message, 1000),
    savedAs: text(data.saved_as),
    resumes: data.resumes === true,
    summary: data.summary === true,
    canSample: data.can_sample === true,
    wantsSample: data.wants_sample === true,
    samples: Array.isArray(data.samples) ? data.samples.slice(0, MOST_SAMPLES).map(readSample).filter(Boolean) : null,
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

/** A picture sampled during training: step, prompt, its file below the output folder, and its likeness or null. */
function readSample(data) {
  if (!data || number(data.step) === null || !text(data.file)) return null;
  const [file, subfolder] = [text(data.file), text(data.subfolder, 1000)];
  return { step: count(data.step), prompt: count(data.prompt), file, subfolder, likeness: number(data.likeness) };
}

/** The mean likeness of each step's samples, `[step, likeness]` in the order of steps; empty if it was not measured. */
export function likenessByStep(samples) {
  const steps = new Map();
  for (const { step, likeness } of samples ?? []) {
    if (likeness !== null) steps.set(step, [...(steps.get(step) ?? []), likeness]);
  }
  const means = [...steps].map(([step, all]) => [step, all.reduce((sum, one) => sum + one, 0) / all.length]);
  return means.sort(([one], [other]) => one - other);
}

/** The pair `[step, likeness]` with the highest likeness, the earliest of equals, or null. */
export function mostAlike(pairs) {
  return pairs.reduce((best, pair) => (best && best[1] >= pair[1] ? best : pair), null);
}

/** The run with the points of `news` appended. */
export function extended(run, news) {
  let points = [...run.points, ...news.points];
  if (points.length > LIMIT) {
    const last = points.at(-1);
    points = points.filter((_, index) => index % 2 === 0);
    if (points.at(-1) !== last) points.push(last);
  }
  return { ...news, points, samples: news.samples ?? run.samples };
}
