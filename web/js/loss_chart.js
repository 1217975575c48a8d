// The element on the trainer's node: what runs, the curve, samples, figures and files. Independent of ComfyUI.

import { FONT, plot } from "./loss_plot.js";
import { SampleStrip } from "./sample_strip.js";
import { bytes, say, work } from "./words.js";

const PHASES = [
  "starting", "preparing", "selecting", "precomputing", "sampling", "training", "done", "cancelled", "failed", "lost",
];

export const MIN_HEIGHT = 250;

/**
 * An element that draws runs.
 *
 * `address(sample)` is the URL of a sample's picture; `openSummary(run)` and `openHelp(failure)` open a page;
 * `sampleNow(run)` asks for a sample.
 */
export class LossChart {
  constructor({ address = () => "", openSummary = () => {}, openHelp = () => {}, sampleNow = () => {} } = {}) {
    this.run = this.failure = null;
    this.note = "";
    this.element = make("div", {
      className: "blockskip-chart",
      style:
        `min-height:${MIN_HEIGHT}px;height:100%;width:100%;box-sizing:border-box;padding:6px 8px;display:flex;gap:3px;` +
        "flex-direction:column;overflow:hidden;pointer-events:none;border-radius:4px;font:11px/1.35 system-ui,sans-serif;" +
        "color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);border:1px solid var(--border-color,#4e4e4e)",
    });
    this.head = make("div", { className: "blockskip-head", style: "font-weight:600;overflow-wrap:anywhere;flex:none" });
    this.message = make("div", {
      className: "blockskip-message",
      style: "flex:none;max-height:5.4em;overflow:auto;pointer-events:auto;overflow-wrap:anywhere;user-select:text",
    });
    this.room = make("div", { style: "position:relative;flex:1 1 70px;min-height:60px" });
    this.canvas = make("canvas", { style: "position:absolute;inset:0;width:100%;height:100%" });
    this.canvas.setAttribute("role", "img");
    this.strip = new SampleStrip(address);
    this.figures = make("div", {
      className: "blockskip-figures",
      style: "white-space:pre-line;flex:none;color:var(--descrip-text,#999)",
    });
    this.summary = link(() => openSummary(this.run));
    this.summary.className = "blockskip-summary";
    this.sampleNow = link(() => sampleNow(this.run));
    this.sampleNow.className = "blockskip-sample-now";
    this.sampleNow.style.cssText += "text-decoration:none;border:1px solid var(--border-color,#4e4e4e);border-radius:4px;padding:1px 8px";
    this.help = link(() => openHelp(this.failure));
    this.room.append(this.canvas);
    this.element.append(this.head, this.message, this.room, this.strip.element, this.figures, this.sampleNow, this.summary);
    new ResizeObserver(() => this.redraw()).observe(this.room);
    this.redraw();
  }

  /** Show a run, or null for no run. */
  show(run) {
    if (run?.status === "running") this.failure = null;
    this.run = run;
    this.redraw();
  }

  /** Show what a node before the trainer is doing; an empty text shows the run again. */
  announce(note) {
    if (note) this.failure = null;
    this.note = note;
    this.redraw();
  }

  /** Show that a node could not run, until something runs again: {title, type, message}. */
  fail(failure) {
    this.note = "";
    this.failure = failure;
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
    this.tell();
    this.room.style.display = run?.points.length ? "" : "none"; // without a curve what will be here follows the headline
    this.strip.show(run?.samples ?? []);
    this.figures.textContent = run ? figures(run) : say("chart.empty");
    this.summary.textContent = say("chart.summary");
    this.summary.style.display = run?.summary && !note ? "" : "none";
    const asked = Boolean(run?.wantsSample);
    this.sampleNow.textContent = say(asked ? "sample.asked" : "sample.now");
    this.sampleNow.disabled = asked;
    this.sampleNow.style.opacity = asked ? 0.6 : 1;
    this.sampleNow.style.display = run?.status === "running" && run.canSample && !note ? "" : "none";
    this.canvas.setAttribute("aria-label", say("chart.label", { count: run?.points.length ?? 0 }));
    Object.assign(this.element.dataset, { points: run?.points.length ?? 0, status: run?.status ?? "none", run: run?.run ?? "" });
    this.drawCurve();
  }

  /** The headline, and below it the sentence about an end that was not planned. */
  tell() {
    const { run, note, failure } = this;
    const message = failure?.message || (note || !run ? "" : ending(run));
    this.head.textContent = failure ? say("chart.failed", { node: failure.title }) : note || (run ? headline(run) : say("chart.none"));
    this.message.replaceChildren(message);
    this.message.style.display = message ? "" : "none";
    this.message.style.color = failure || run?.status === "failed" ? "#e0674a" : "";
    if (failure) {
      this.help.textContent = say("error.help");
      this.message.append(" ", this.help);
    }
  }

  drawCurve() {
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
    if (this.run?.points.length) plot(pen, this.run, { width, height, ink, pale });
  }
}

function make(tag, { className = "", style }) {
  const element = document.createElement(tag);
  element.className = className;
  element.style.cssText = style;
  return element;
}

function link(open) {
  const button = make("button", {
    style: "all:unset;pointer-events:auto;cursor:pointer;text-decoration:underline;align-self:flex-start;flex:none",
  });
  button.onclick = open;
  return button;
}

/** A phase with its progress: "Sampling 8 of 12", or with the part of it, "Precomputing · encoding crops 8 of 12". */
export function progress(phase, done, total, detail = "") {
  const name = PHASES.includes(phase) ? say(`phase.${phase}`) : phase;
  const parts = detail && !detail.startsWith(phase) ? [name, work(detail)] : [name];
  return total ? say("chart.progress", { phase: parts.join(" · "), done, total }) : parts.join(" · ");
}

function headline({ phase, detail, done, total, step, steps, secondsLeft }) {
  const parts = [phase === "training" ? say("phase.training") : progress(phase, done, total, detail)];
  if (steps && phase !== "precomputing") parts.push(say("chart.step", { step: step ?? 0, steps }));
  if (secondsLeft !== null && phase === "training") parts.push(say("chart.left", { time: duration(secondsLeft) }));
  return parts.filter(Boolean).join(" · ");
}

/** What to know about a run that has ended. */
export function ending({ status, step, steps, savedAs, resumes, message }) {
  if (status === "failed") return message;
  if (status === "done") return [savedAs && say("done.saved", { file: savedAs }), message].filter(Boolean).join(" ");
  if (status === "lost") return resumes ? say("lost.resumes") : "";
  if (status !== "cancelled") return "";
  if (!savedAs) return say("cancel.nothing");
  return say(resumes ? "cancel.resumes" : "cancel.saved", { step, steps, file: savedAs });
}

function figures({ points, secondsPerStep, memoryNow, memoryPeak, memoryOf }) {
  const [, loss, smoothed, rate] = points.at(-1) ?? [];
  const first = [
    known(loss, (x) => say("figure.loss", { x: x.toFixed(4) })),
    known(smoothed, (x) => say("figure.smoothed", { x: x.toFixed(4) })),
    known(rate, (x) => say("figure.rate", { x: x.toExponential(2) })),
    known(secondsPerStep, (x) => say("figure.pace", { x: x.toPrecision(3) })),
  ];
  const second = [
    known(memoryNow, (x) => say("figure.memory", { x: bytes(x) })),
    known(memoryPeak, (x) => say("figure.peak", { x: bytes(x) })),
    memoryNow === null ? "" : work(memoryOf),
  ];
  return [first, second].map((parts) => parts.filter(Boolean).join(" · ")).join("\n");
}

const known = (value, told) => (value === null || value === undefined ? "" : told(value));

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return say("time.seconds", { s: whole });
  if (whole < 3600) return say("time.minutes", { m: Math.floor(whole / 60), s: whole % 60 });
  return say("time.hours", { h: Math.floor(whole / 3600), m: Math.floor((whole % 3600) / 60) });
}
