// Puts a chart on Dynamic Patch Trainer, Train Word and Train Patch Adapters, and keeps it up to date.
//
// It uses events during a run, the server's memory on a new page, and the node's output for a run from the cache.
// The server's side is nodes/page/live_chart.py.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { allNodes, nodeOfExecution, nodeOfLocator, root } from "./graph_nodes.js";
import { openHelp } from "./help_page.js";
import { LossChart, MIN_HEIGHT, ending, progress } from "./loss_chart.js";
import "./more_settings.js"; // registered before this, so that its button is above the chart
import { addElement, onOutput } from "./node_display.js";
import { onFailure, toast } from "./notices.js";
import { register } from "./register.js";
import { extended, readRun } from "./run_data.js";
import { say, speak } from "./words.js";

const TRAINERS = ["BlockSkip_TrainLora", "BlockSkip_TrainWord", "BlockSkip_TrainDDiT"];
const EVENT = "blockskip.train";
const ROUTE = "/blockskip/last_run";
const SUMMARY = "/blockskip/summary";
const SAMPLE = "/blockskip/sample_now";

const charts = new WeakMap(); // node -> its chart
const shown = new Set(); // weak references to all charts, for changes of the theme
let refreshing = null;

/** Every trainer's chart in the open workflow with the node's execution id. */
function* trainers() {
  for (const [id, node] of allNodes()) if (charts.has(node)) yield [id, charts.get(node)];
}

/** Show a run read from memory or an output, unless the chart has a newer run or more of this one. */
function offer(chart, run) {
  const now = chart.run;
  const older = now && (run.started < now.started || (run.run === now.run && run.count <= now.count));
  if (!older || (run.run === now.run && run.count === now.count && run.status !== "running")) chart.show(run);
}

/** Fetch the last run of a node from the server; if called again in the meantime, fetch it once more. */
async function fetchRun(id, chart) {
  chart.asked = true;
  if (chart.fetching) return;
  chart.fetching = true;
  try {
    while (chart.asked) {
      chart.asked = false;
      const run = await askServer(id);
      if (run) offer(chart, run);
      else if (chart.run?.status === "running") chart.show({ ...chart.run, status: "lost", phase: "lost", resumes: resumes(id) });
    }
  } catch (error) {
    console.warn("BlockSkip: the last run could not be read.", error);
  } finally {
    chart.fetching = false;
  }
}

/** Whether the trainer with an execution id saves states while it trains, and resumes from them. */
function resumes(id) {
  const value = (name) => nodeOfExecution(id)?.widgets?.find((widget) => widget.name === name)?.value;
  return value("resume") !== false && value("save_every") !== 0;
}

async function askServer(id) {
  const query = new URLSearchParams({ node: id });
  if (root()?.id) query.set("workflow", root().id);
  const reply = await api.fetchApi(`${ROUTE}?${query}`, { cache: "no-store" });
  if (!reply.ok) throw new Error(`${ROUTE} answered ${reply.status}`);
  return readRun((await reply.json())?.run);
}

/** Refresh all charts of the open workflow after a delay, because ids are set after the nodes are created. */
function refreshAll() {
  clearTimeout(refreshing);
  refreshing = setTimeout(() => {
    for (const [id, chart] of trainers()) fetchRun(id, chart);
  }, 100);
}

function onEvent({ detail }) {
  if (!detail || typeof detail !== "object") return;
  if (detail.workflow && root()?.id && detail.workflow !== root().id) return; // for another workflow
  const chart = charts.get(nodeOfExecution(detail.node));
  if (!chart) return;
  const news = readRun(detail);
  if (!news) {
    const words = [detail.phase, detail.detail].map((word) => String(word ?? "").slice(0, 200));
    chart.announce(progress(words[0], Number(detail.done), Number(detail.total), words[1]));
    return;
  }
  chart.announce("");
  if (news.status === "cancelled" && chart.run?.status === "running") toast("info", say("cancel.title"), ending(news));
  if (chart.run?.run === news.run && chart.run.count === news.first) chart.show(extended(chart.run, news));
  else if (news.first === 0) chart.show(news);
  else fetchRun(String(detail.node), chart); // points were missed
}

/** Ask a run to sample at its next step; the server's next event says that it was asked. */
async function sampleNow({ run }) {
  const reply = await api.fetchApi(`${SAMPLE}?${new URLSearchParams({ run })}`, { method: "POST" });
  if (!reply.ok) toast("info", say("sample.title"), say("sample.refused"));
}

function addChart(node) {
  const chart = new LossChart({
    address: ({ file, subfolder }) => api.apiURL(`/view?${new URLSearchParams({ filename: file, subfolder, type: "output" })}`),
    openSummary: ({ run }) => window.open(api.apiURL(`${SUMMARY}?${new URLSearchParams({ run })}`), "_blank", "noopener"),
    openHelp: ({ type, message }) => openHelp(type, message),
    sampleNow,
  });
  charts.set(node, chart);
  shown.add(new WeakRef(chart));
  addElement(node, chart.element, { name: "loss_chart", type: "blockskip_chart", height: MIN_HEIGHT });
  onOutput(node, (output) => {
    const run = readRun(output?.blockskip_chart?.[0]);
    if (run && run.run !== chart.run?.run) chart.show(run); // from the cache: the run behind the node's current outputs
  });
  refreshAll();
}

function redrawAll() {
  for (const reference of shown) {
    const chart = reference.deref();
    if (chart) chart.redraw();
    else shown.delete(reference);
  }
}

const extension = {
  name: "BlockSkip.LiveChart",
  setup() {
    speak(app.extensionManager.setting?.get("Comfy.Locale"));
    onFailure((failure) => {
      for (const [, chart] of trainers()) chart.fail(failure);
    });
    api.addEventListener(EVENT, onEvent);
    api.addEventListener("reconnected", refreshAll);
    api.addEventListener("status", ({ detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) for (const [, chart] of trainers()) chart.announce("");
    });
    const observer = new MutationObserver(redrawAll);
    for (const element of [document.documentElement, document.body]) {
      observer.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
  },
  nodeCreated(node) {
    if (TRAINERS.includes(node.comfyClass)) addChart(node);
  },
  afterConfigureGraph: refreshAll,
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs ?? {})) {
      const chart = charts.get(nodeOfLocator(key) ?? {});
      const run = chart && readRun(output?.blockskip_chart?.[0]);
      if (run) offer(chart, run);
    }
  },
};

register(extension);
