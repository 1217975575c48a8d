// Opens workflows in ComfyUI's real frontend, in a headless Chromium, and reports problems.
//
//   node devtools/check_workflow.mjs SERVER WORKFLOW.json [MORE.json ...] [options]
//   node devtools/check_workflow.mjs SERVER --from-api PROMPT.json --out WORKFLOW.json [options]
//
//   --vue                draw the nodes with the Vue renderer (Nodes 2.0)
//   --run                queue the workflow in the page and wait until it has ended
//   --screenshot FILE    save a picture of the whole graph, as .png or .jpg
//   --screenshots DIR    the same for each of several workflows, as DIR/<its name>.png
//   --size WxH           size of the window, which is the largest size of the picture (default 1600x1000)
//   --api-out FILE       save the API-format prompt that the frontend would queue
//   --api-outs DIR       the same for each of several workflows, as DIR/<its name>.json
//   --from-api FILE      load an API-format prompt instead of a workflow, and lay out its nodes
//   --out FILE           save the workflow in the frontend's own format
//   --pack-version V     the version to write for the nodes of custom packs in --out (default "unknown")
//   --browser FILE       the Chromium to use (default: the first one on PATH)
//   --modules DIR        where playwright-core is installed (default: the cache folder of the tests)
//
// To be run by hand; it needs `npm install --prefix ~/.cache/blockskip/node playwright-core` and a Chromium.
// The exit status is 1 if a workflow has a problem, 2 if it could not be checked.

import { randomUUID } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";

import { NotChecked, configure, launch, listen, open, settle } from "./browser.mjs";

const MODEL_FILE = /\.(safetensors|sft|ckpt|pth|pt|gguf)$/;

async function main() {
  const { server, options, sources } = readArguments();
  const report = { problems: [], notes: [] };
  await configure(server, { "Comfy.VueNodes.Enabled": options.vue });
  const browser = await launch(options);
  let found = 0;
  try {
    const [width, height] = options.size.split("x").map(Number);
    const page = await browser.newPage({ viewport: { width, height } });
    listen(page, report);
    await open(page, server);
    await watchForMissingNodes(page);
    for (const source of sources) {
      await check(page, source, server, options, report);
      found += tell(source, report);
    }
    await page.waitForTimeout(1_500); // complaints that come late
    report.problems.push(...(await toasts(page)));
    if (report.problems.length) found += tell("afterwards", report);
  } finally {
    await browser.close();
  }
  return found ? 1 : 0;
}

/** Load and check one workflow as the options specify. */
async function check(page, source, server, options, report) {
  const name = basename(source, ".json");
  const before = JSON.parse(readFileSync(source, "utf8"));
  await load(page, before, name, Boolean(options["from-api"]));
  const after = await converted(page, report);
  await inspect(page, report, options["from-api"] ? null : before, after?.workflow);
  if (options.run) await run(page, report);
  const prompt = options["api-outs"] ? join(options["api-outs"], `${name}.json`) : options["api-out"];
  if (prompt && after) writeJson(prompt, after.output);
  if (options.out && after) writeJson(options.out, await stamped(server, after.workflow, options["pack-version"]));
  const file = options.screenshots ? join(options.screenshots, `${name}.png`) : options.screenshot;
  if (file) await picture(page, file);
}

/** Print and clear the findings of a workflow, and return the number of problems. */
function tell(source, report) {
  report.notes.splice(0).forEach((note) => console.log(`note: ${note}`));
  const problems = report.problems.splice(0);
  problems.forEach((problem) => console.log(`problem: ${problem}`));
  console.log(`${basename(source)}: ${problems.length} problem(s)`);
  return problems.length;
}

function readArguments() {
  const text = { type: "string" };
  const flag = { type: "boolean", default: false };
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      vue: flag,
      run: flag,
      screenshot: text,
      screenshots: text,
      size: { type: "string", default: "1600x1000" },
      "api-out": text,
      "api-outs": text,
      "from-api": text,
      out: text,
      "pack-version": { type: "string", default: "unknown" },
      browser: text,
      modules: text,
    },
  });
  const [server, ...workflows] = positionals;
  const sources = values["from-api"] ? [values["from-api"]] : workflows;
  if (!server || !sources.length) throw new NotChecked("give the server's address and a workflow file");
  return { server: server.replace(/\/$/, ""), options: values, sources };
}

async function watchForMissingNodes(page) {
  await page.evaluate(() => {
    window.missingNodes = [];
    window.app.registerExtension({
      name: "blockskip.check",
      afterConfigureGraph: (missing) => window.missingNodes.push(...missing.map((node) => node.type ?? node)),
    });
  });
}

/** Load a graph, or lay out an API-format prompt. */
async function load(page, graph, name, isApi) {
  await page.evaluate(
    async ({ graph, name, isApi }) => {
      window.missingNodes = [];
      if (!isApi) return window.app.loadGraphData(graph, true, true, name);
      const known = window.LiteGraph.registered_node_types;
      window.missingNodes = Object.values(graph).map((node) => node.class_type).filter((type) => !known[type]);
      window.app.loadApiJson(graph, name);
    },
    { graph, name, isApi },
  );
  if (isApi) await page.evaluate(layOut);
  await settle(page);
}

/** The loaded graph as converted by the frontend, `{workflow, output}`; undefined if the conversion fails. */
async function converted(page, { problems }) {
  try {
    return await page.evaluate(() => window.app.graphToPrompt());
  } catch (error) {
    problems.push(`graphToPrompt: ${error.message.split("\n")[0]}`);
  }
}

/** Arrange the nodes in columns along the links: each node just before its first consumer, near its sources. */
function layOut() {
  const graph = window.app.rootGraph ?? window.app.graph;
  const [columnGap, rowGap, titleHeight] = [80, 30, window.LiteGraph.NODE_TITLE_HEIGHT];
  const links = [...graph.links.values()];
  const nodes = graph.computeExecutionOrder(false, true);
  const pictured = nodes.filter((node) => ["PreviewImage", "SaveImage", "LoadImage"].includes(node.type));
  for (const node of pictured) node.setSize([Math.max(node.size[0], 270), node.size[1] + 260]);
  const readers = (node) => links.filter((link) => link.origin_id === node.id).map((link) => link.target_id);
  const sources = (node) => links.filter((link) => link.target_id === node.id).map((link) => link.origin_id);
  const level = new Map();
  for (const node of nodes) level.set(node.id, Math.max(0, ...sources(node).map((id) => level.get(id) + 1)));
  for (const node of [...nodes].reverse()) {
    const first = Math.min(...readers(node).map((id) => level.get(id)));
    if (Number.isFinite(first)) level.set(node.id, first - 1);
  }
  const columns = [];
  for (const node of nodes) (columns[level.get(node.id)] ??= []).push(node);
  const middle = (node) => node.pos[1] + node.size[1] / 2;
  let left = 0;
  for (const column of columns.filter(Boolean)) {
    const height = (node) => {
      const above = sources(node).map((id) => middle(graph.getNodeById(id)));
      return above.length ? above.reduce((a, b) => a + b) / above.length : Infinity;
    };
    const wanted = new Map(column.map((node, index) => [node, [height(node), index]]));
    column.sort((a, b) => wanted.get(a)[0] - wanted.get(b)[0] || wanted.get(a)[1] - wanted.get(b)[1]);
    let top = titleHeight;
    for (const node of column) {
      node.pos = [left, top];
      top += node.size[1] + titleHeight + rowGap;
    }
    left += Math.max(...column.map((node) => node.size[0])) + columnGap;
  }
  window.app.canvas.setDirty(true, true);
}

/** Report missing nodes, toasts, values that changed on loading, and values that are not among the choices. */
async function inspect(page, { problems, notes }, before, after) {
  const missing = await page.evaluate(() => [...new Set(window.missingNodes)]);
  problems.push(...missing.map((type) => `missing node: ${type}`));
  problems.push(...(await toasts(page)));
  if (before && after) problems.push(...drift(before, after));
  for (const { title, name, value } of await page.evaluate(unknownChoices)) {
    const text = `${title}: ${name} is ${JSON.stringify(value)}, which is not among the choices`;
    (MODEL_FILE.test(value) ? notes : problems).push(text);
  }
}

async function toasts(page) {
  const shown = await page.locator(".p-toast-message").allInnerTexts();
  return shown.map((toast) => `toast: ${toast.replace(/\s+/g, " ")}`);
}

function drift(before, after) {
  const loaded = new Map(after.nodes.map((node) => [node.id, node]));
  return before.nodes.flatMap((node) => {
    const [was, is] = [node.widgets_values, loaded.get(node.id)?.widgets_values].map((v) => JSON.stringify(v ?? []));
    return was === is ? [] : [`drift in node ${node.id} (${node.type}): ${was} became ${is}`];
  });
}

function unknownChoices() {
  const nodes = (window.app.rootGraph ?? window.app.graph).nodes;
  return nodes.flatMap((node) =>
    (node.widgets ?? []).flatMap((widget) => {
      const values = widget.type === "combo" ? widget.options?.values : null;
      const choices = typeof values === "function" ? values(widget, node) : values;
      const unknown = Array.isArray(choices) && !choices.includes(widget.value);
      return unknown ? [{ title: node.title, name: widget.name, value: widget.value }] : [];
    }),
  );
}

/** Queue the graph in the page and wait for its end. */
async function run(page, { problems }) {
  const ending = await page.evaluate(
    () =>
      new Promise((resolve) => {
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
          window.app.api.addEventListener(kind, ({ detail }) => resolve({ kind, why: detail.exception_message }));
        }
        window.app.queuePrompt(0, 1).then((queued) => queued || resolve({ kind: "prompt refused" }));
      }),
  );
  await page.waitForTimeout(1_500);
  if (ending.kind !== "execution_success") problems.push(`run: ${ending.kind} ${ending.why ?? ""}`.trim());
}

/** Return the workflow with a new id and the origin (`cnr_id` and `ver`) of every node. */
async function stamped(server, workflow, version) {
  const [descriptions, stats] = await Promise.all(
    ["object_info", "system_stats"].map(async (path) => (await fetch(`${server}/${path}`)).json()),
  );
  const core = { cnr_id: "comfy-core", ver: stats.system.comfyui_version };
  for (const node of workflow.nodes) {
    if (!descriptions[node.type]) continue; // exists only in the frontend, such as a note
    const [kind, pack] = descriptions[node.type].python_module.split(".");
    Object.assign(node.properties, kind === "custom_nodes" ? { cnr_id: pack, ver: version } : core);
  }
  return { ...workflow, id: randomUUID() };
}

/** Fit the graph into the window, hide everything else and save a picture. */
async function picture(page, file) {
  await page.addStyleTag({ content: ".p-toast, .p-dialog-mask { opacity: 0 !important; }" });
  await page.evaluate(() => (window.app.extensionManager.focusMode = true));
  await page.waitForTimeout(500);
  const clip = await page.evaluate(fitView);
  await page.waitForTimeout(1_000);
  await page.screenshot({ path: file, clip, ...(/\.jpe?g$/.test(file) ? { type: "jpeg", quality: 88 } : {}) });
}

/** Show the whole graph; return the rectangle of the page that it covers. */
function fitView() {
  const { canvas } = window.app;
  const margin = 24;
  const graph = window.app.rootGraph ?? window.app.graph;
  const boxes = [...graph.nodes, ...graph.groups].map((item) => item.boundingRect);
  const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])));
  const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])));
  const room = canvas.canvas.getBoundingClientRect();
  const [width, height] = [right - left, bottom - top];
  const scale = Math.min((room.width - 2 * margin) / width, (room.height - 2 * margin) / height, 1);
  canvas.ds.scale = scale;
  canvas.ds.offset[0] = -left + (room.width / scale - width) / 2;
  canvas.ds.offset[1] = -top + (room.height / scale - height) / 2;
  canvas.deselectAll?.();
  canvas.setDirty(true, true);
  return {
    x: Math.max(0, room.x + (room.width - width * scale) / 2 - margin),
    y: Math.max(0, room.y + (room.height - height * scale) / 2 - margin),
    width: Math.min(room.width, width * scale + 2 * margin),
    height: Math.min(room.height, height * scale + 2 * margin),
  };
}

function writeJson(file, value) {
  writeFileSync(file, `${JSON.stringify(value, null, 2)}\n`);
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(error instanceof NotChecked ? `check_workflow: ${error.message}` : error);
  process.exitCode = 2;
}
