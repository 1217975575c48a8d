// Shows a plan on Memory Plan's node: a sentence, a bar as set and a bar as run, and the phases.
//
// The numbers are those of the node's output; nodes/memory_plan.py counts them.

import "./more_settings.js"; // registered before this, so that its button is above the bars
import { addElement, displayBox, showOutputs } from "./node_display.js";
import { bytes, say } from "./words.js";

const PLAN = "BlockSkip_MemoryPlan";
const OUTPUT = "blockskip_plan";
const HEIGHT = 178;
const COLOURS = { fits: "#4a8fe7", tooMuch: "#d0543a" };
const HATCHED = "repeating-linear-gradient(45deg,#8886 0 3px,transparent 3px 7px)";

const number = (value) => (typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : null);

/** A plan as sent by the server, or null if it is none. */
export function readPlan(data) {
  const available = number(data?.available);
  const asSet = readPeaks(data?.as_set);
  if (available === null || !asSet) return null;
  const texts = (list) => (Array.isArray(list) ? list.filter((text) => typeof text === "string") : []);
  return {
    available,
    largest: number(data.largest) ?? available,
    asSet,
    asRun: readPeaks(data.as_run),
    fits: data.fits === true,
    place: String(data.place ?? ""),
    advice: String(data.advice ?? ""),
    hint: String(data.hint ?? ""),
    changes: texts(data.changes),
    skipped: texts(data.skipped),
  };
}

function readPeaks(data) {
  const peak = number(data?.peak);
  if (peak === null) return null;
  return { peak, phases: Object.entries(data.phases ?? {}).filter(([, bytes]) => number(bytes) !== null) };
}

/** The plan in a sentence or two; `isConnected` is whether the run uses the plan's settings. */
export function sentence(plan, isConnected) {
  const values = { needed: bytes(plan.asSet.peak), available: bytes(plan.available) };
  const first = say(plan.fits ? "plan.fits" : "plan.needs", values);
  if (!plan.asRun) return `${first} ${plan.advice}`;
  const changes = { changes: plan.changes.join(", "), needed: bytes(plan.asRun.peak) };
  const second = plan.changes.length ? say(isConnected ? "plan.runs" : "plan.would", changes) : "";
  return [first, second, plan.hint].filter(Boolean).join(" ");
}

function element(style, text = "") {
  const made = document.createElement("div");
  made.style.cssText = style;
  made.textContent = text;
  return made;
}

/** A row: a name, a bar and a number. A phase that is not run is hatched. */
function row(name, peak, plan, longest, { thin = false, skipped = false } = {}) {
  const line = element(`display:grid;grid-template-columns:92px 1fr;gap:6px;align-items:center;height:${thin ? 15 : 20}px;flex:none`);
  line.className = skipped ? "blockskip-skipped" : "blockskip-bar";
  const room = element("position:relative;height:100%;min-width:0");
  const fill = skipped ? HATCHED : peak <= plan.largest ? COLOURS.fits : COLOURS.tooMuch;
  const width = `${(100 * peak) / longest}%`;
  const margin = element(`position:absolute;inset:0 auto 0 ${(100 * plan.largest) / longest}%;width:${(100 * (plan.available - plan.largest)) / longest}%;background:#8884`);
  margin.className = "blockskip-margin";
  margin.title = say("plan.margin");
  room.append(
    element(`position:absolute;inset:${thin ? 3 : 2}px auto ${thin ? 3 : 2}px 0;width:${width};background:${fill};border-radius:2px`),
    margin,
    element(`position:absolute;inset:0 auto 0 ${(100 * plan.available) / longest}%;border-left:2px solid currentColor`),
    element("position:absolute;inset:0 4px 0 4px;display:flex;align-items:center;text-shadow:0 0 3px #000;color:#fff",
      skipped ? say("plan.skipped") : bytes(peak)),
  );
  line.append(element("overflow:hidden;text-overflow:ellipsis;white-space:nowrap", name), room);
  return line;
}

function draw(box, plan, isConnected) {
  box.dataset.fits = plan ? String(plan.fits) : "";
  if (!plan) return box.replaceChildren(element("color:var(--descrip-text,#999)", say("plan.empty")));
  const run = plan.asRun ?? plan.asSet;
  const phases = run.phases.map(([phase, peak]) => [phase, peak, plan.skipped.includes(phase)]);
  const longest = 1.04 * Math.max(1, plan.available, plan.asSet.peak, ...phases.map(([, peak, skipped]) => (skipped ? 0 : peak)));
  const lines = phases.length > 3 ? 3.1 : 4.6; // a fourth phase takes a line of the sentence, which can be scrolled
  const told = element(`font-weight:600;flex:none;max-height:${lines}em;overflow:auto`, sentence(plan, isConnected));
  told.className = "blockskip-verdict";
  return box.replaceChildren(
    told,
    row(say("plan.set"), plan.asSet.peak, plan, longest),
    ...(plan.asRun ? [row(say("plan.run"), plan.asRun.peak, plan, longest)] : []),
    ...phases.map(([phase, peak, skipped]) => row(phaseName(phase), Math.min(peak, longest), plan, longest, { thin: true, skipped })),
    element("color:var(--descrip-text,#999);flex:none", say("plan.available", { available: bytes(plan.available), place: plan.place })),
  );
}

function phaseName(phase) {
  return ["choosing blocks", "precomputing", "training", "patch adapters"].includes(phase) ? say(`plan.${phase}`) : phase;
}

function addBars(node) {
  const box = displayBox("blockskip-plan", HEIGHT, 2);
  let plan = null;
  const isConnected = () => (node.outputs?.find(({ name }) => name === "settings")?.links ?? []).length > 0;
  const redraw = () => draw(box, plan, isConnected());
  addElement(node, box, { name: "plan_bars", type: "blockskip_plan", height: HEIGHT });
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function () {
    onConnectionsChange?.apply(this, arguments);
    setTimeout(redraw);
  };
  redraw();
  return (output) => {
    plan = readPlan(output?.[OUTPUT]?.[0]) ?? plan;
    redraw();
  };
}

showOutputs({ name: "BlockSkip.PlanBars", nodeClass: PLAN, add: addBars });
