// Runs a training in ComfyUI's real frontend, in a headless Chromium, and checks the chart on the trainer's node.
//
//   node devtools/check_chart.mjs SERVER PROMPT.json [--screenshots DIR]
//
// PROMPT.json is an API-format prompt with one Dynamic Patch Trainer. This checks the chart after a run, in the page that
// queued it and in a second browser; after a reload; after switching to another tab and back; when the run comes from the
// cache; with the Vue renderer (Nodes 2.0); inside a subgraph; and that the saved workflow's values keep their positions.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { NotChecked, configure, launch, listen, open } from "./browser.mjs";

const PERSIST = { "Comfy.Workflow.Persist": true }; // a reload opens the same workflow again, as for users

const problems = [];
const { values: options, positionals } = parseArgs({ allowPositionals: true, options: { screenshots: { type: "string" } } });

async function main() {
  const [address, file] = positionals;
  if (!address || !file) throw new NotChecked("give the server's address and an API-format prompt");
  const server = address.replace(/\/$/, "");
  const prompt = JSON.parse(readFileSync(file, "utf8"));
  const trainer = Object.values(prompt).find((node) => node.class_type === "BlockSkip_TrainLora");
  const finished = { points: trainer.inputs.steps, status: "done" };
  await configure(server, { ...PERSIST, "Comfy.VueNodes.Enabled": false });
  const browser = await launch();
  try {
    const page = await newPage(browser, server);
    const workflow = await asWorkflow(page, prompt);
    checkValues(workflow);

    const second = await newPage(browser, server);
    for (const one of [page, second]) {
      await one.evaluate((graph) => window.app.loadGraphData(graph, true, true, "chart"), workflow.workflow);
    }
    await show(page);
    const { run: before } = await page.evaluate(readChart); // a run queued by a script, whose prompts name no workflow
    await Promise.all([queue(page), watch(page, before, trainer.inputs.steps)]);
    const { run } = await expectChart(page, "after a run", finished);
    finished.run = run;
    await expectChart(second, "in a second browser", finished);
    await second.context().close();
    await picture(page, "classic");

    await reload(page);
    await expectChart(page, "after a reload", finished);
    await checkSame(page, workflow, "after a reload");
    await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow"));
    await page.evaluate(() => window.app.extensionManager.command.execute("Workspace.PreviousOpenedWorkflow"));
    await expectChart(page, "in a tab that was left", finished);

    await page.route("**/blockskip/last_run*", (route) => route.fulfill({ json: { run: null } }));
    await configure(server, { ...PERSIST, "Comfy.VueNodes.Enabled": true });
    await reload(page);
    await expectChart(page, "with an empty history", { points: 0, status: "none" });
    await queue(page);
    await checkSame(page, workflow, "before it is queued again");
    await expectChart(page, "out of the cache", finished);
    await page.unroute("**/blockskip/last_run*");

    await reload(page);
    await expectChart(page, "in Nodes 2.0", finished, { onPage: true });
    await picture(page, "vue");
    if (options.screenshots) {
      await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.ColorPalette", "light"));
      await picture(page, "light");
      await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.ColorPalette", "dark"));
    }
    await page.evaluate(() => {
      const node = window.app.rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
      node.widgets.find(({ name }) => name === "seed").value += 1; // a new run, not one from the cache
      window.app.graph.convertToSubgraph(new Set([node]));
    });
    await page.waitForTimeout(500);
    await queue(page);
    const inside = await expectChart(page, "inside a subgraph", { points: finished.points, status: "done" });
    if (inside.run === run) problems.push("inside a subgraph: the chart still shows the run from outside");
  } finally {
    await browser.close();
  }
  problems.forEach((problem) => console.log(`problem: ${problem}`));
  console.log(`chart: ${problems.length} problem(s)`);
  return problems.length ? 1 : 0;
}

/** Convert the prompt to a workflow with an id, which graphs from other sources do not have. */
async function asWorkflow(page, prompt) {
  await page.evaluate((graph) => window.app.loadApiJson(graph, "chart"), prompt);
  await page.waitForTimeout(1_000);
  const { workflow, output } = await page.evaluate(() => window.app.graphToPrompt());
  return { workflow: { ...workflow, id: randomUUID() }, output };
}

/** Check that the chart shows points of a new run before the run has ended. */
async function watch(page, before, steps) {
  const deadline = Date.now() + 120_000;
  let chart = null;
  do {
    await page.waitForTimeout(100);
    chart = await page.evaluate(readChart);
  } while (Date.now() < deadline && (chart.run === before || (chart.status === "running" && chart.points < 0.6 * steps)));
  if (chart.status !== "running") problems.push(`while it trained the chart was ${JSON.stringify(chart)}`);
  await picture(page, "training");
}

async function newPage(browser, server) {
  const context = await browser.newContext({ viewport: { width: 1100, height: 1000 }, deviceScaleFactor: 1.5 });
  const page = await context.newPage();
  listen(page, { problems });
  await open(page, server);
  return page;
}

async function reload(page) {
  await page.waitForTimeout(1_000); // the frontend saves its drafts after a pause
  await page.reload();
  await page.waitForFunction(() => window.app?.graph && window.app?.extensionManager, null, { timeout: 60_000 });
}

/** Check that every value of the trainer is in its place, and that the chart adds none, in the workflow and the prompt. */
function checkValues({ workflow, output }) {
  const node = workflow.nodes.find(({ type }) => type === "BlockSkip_TrainLora");
  if (node.widgets_values.includes(null)) problems.push(`a hole in ${JSON.stringify(node.widgets_values)}`);
  if (node.widgets_values.includes("")) problems.push(`the chart is in ${JSON.stringify(node.widgets_values)}`);
  const sent = Object.keys(Object.values(output).find((one) => one.class_type === "BlockSkip_TrainLora").inputs);
  if (sent.includes("loss_chart")) problems.push("the chart is in the prompt");
}

/** Check that the page's graph has the same values and would be queued as the same prompt. */
async function checkSame(page, before, when) {
  const after = await page.evaluate(() => window.app.graphToPrompt());
  checkValues(after);
  for (const [id, node] of Object.entries(before.output)) {
    const [was, is] = [node, after.output[id]].map((one) => JSON.stringify(one?.inputs));
    if (was !== is) problems.push(`${when}: node ${id} (${node.class_type}) went from ${was} to ${is}`);
  }
}

/** Queue the graph in the page and wait for its end. */
async function queue(page) {
  const ending = await page.evaluate(
    () =>
      new Promise((resolve) => {
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
          window.app.api.addEventListener(kind, ({ detail }) => resolve(`${kind} ${detail.exception_message ?? ""}`));
        }
        window.app.queuePrompt(0, 1).then((queued) => queued || resolve("prompt refused"));
      }),
  );
  if (!ending.startsWith("execution_success")) problems.push(`run: ${ending}`);
}

/** Return the chart's state and its size on the page, wherever its node is. */
function readChart() {
  const nodes = (graph) => (graph?.nodes ?? []).flatMap((node) => [node, ...nodes(node.subgraph)]);
  const trainer = nodes(window.app.rootGraph ?? window.app.graph).find((one) => one.comfyClass === "BlockSkip_TrainLora");
  const element = trainer?.widgets?.find((widget) => widget.name === "loss_chart")?.element;
  if (!element) return null;
  const { width, height } = element.getBoundingClientRect();
  const { points, status, run } = element.dataset;
  return { points: Number(points), status, run, text: element.innerText, width, height };
}

/** Wait until the chart has the wanted points and status (and run); return its last state. */
async function expectChart(page, when, wanted, { onPage = false } = {}) {
  const fits = (chart) => chart && Object.entries(wanted).every(([name, value]) => chart[name] === value);
  const deadline = Date.now() + 15_000;
  let chart = await page.evaluate(readChart);
  while (!fits(chart) && Date.now() < deadline) {
    await page.waitForTimeout(200);
    chart = await page.evaluate(readChart);
  }
  const told = `${when}: expected ${JSON.stringify(wanted)}, got ${JSON.stringify(chart)}`;
  if (!fits(chart) || (onPage && !(chart.width > 100 && chart.height > 100))) problems.push(told);
  return chart ?? {};
}

/** Bring the trainer into view. */
async function show(page) {
  await page.evaluate(() => {
    const { canvas } = window.app;
    const node = window.app.rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
    node.setSize([420, node.computeSize()[1]]);
    canvas.ds.scale = 1;
    canvas.ds.offset[0] = -node.pos[0] + 120;
    canvas.ds.offset[1] = -node.pos[1] + 170;
    canvas.setDirty(true, true);
  });
}

async function picture(page, name) {
  if (!options.screenshots) return;
  await page.addStyleTag({ content: ".p-toast, .p-dialog-mask { display: none !important; }" });
  await show(page);
  await page.waitForTimeout(1_000);
  const clip = await page.evaluate(() => {
    const { canvas, rootGraph } = window.app;
    const node = rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
    const [left, top, width, height] = node.boundingRect;
    const room = canvas.canvas.getBoundingClientRect();
    const [x, y] = [left + canvas.ds.offset[0] + room.x - 10, top + canvas.ds.offset[1] + room.y - 10];
    return { x, y, width: width + 20, height: Math.min(height + 20, room.bottom - y) };
  });
  await page.screenshot({ path: join(options.screenshots, `${name}.png`), clip });
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(error instanceof NotChecked ? `check_chart: ${error.message}` : error);
  process.exitCode = error instanceof NotChecked ? 2 : 1;
}
