// Runs a training in ComfyUI's real frontend, in a headless Chromium, and checks the chart on the trainer's node.
//
//   node devtools/check_chart.mjs SERVER PROMPT.json [--screenshots DIR]
//
// PROMPT.json is an API-format prompt with one Dynamic Patch Trainer. Looked at: the chart after a run, in the page that
// queued it and in a second browser; after a reload; when the run comes out of the cache; with the Vue renderer
// (Nodes 2.0); inside a subgraph; and that the saved workflow's values stay in their places.
// The exit status is 1 when something is wrong, 2 when it could not be checked.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { NotChecked, configure, launch, listen, open } from "./browser.mjs";

const PERSIST = { "Comfy.Workflow.Persist": true }; // a reload opens the same workflow again, as it does for users

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
    await page.evaluate((graph) => window.app.loadApiJson(graph, "chart"), prompt);
    await page.waitForTimeout(1_000);
    const workflow = await page.evaluate(() => window.app.graphToPrompt());
    checkValues(workflow, Object.keys(trainer.inputs));

    const second = await newPage(browser, server);
    await second.evaluate((graph) => window.app.loadGraphData(graph, true, true, "the same"), workflow.workflow);
    await show(page);
    await queue(page);
    await expectChart(page, "after a run", finished);
    await expectChart(second, "in a second browser", finished);
    await second.context().close();
    await picture(page, "classic");

    await reload(page);
    await expectChart(page, "after a reload", finished);
    const reloaded = await page.evaluate(() => window.app.graphToPrompt());
    checkValues(reloaded, Object.keys(trainer.inputs));

    await page.route("**/blockskip/last_run*", (route) => route.fulfill({ json: { run: null } }));
    await configure(server, { ...PERSIST, "Comfy.VueNodes.Enabled": true });
    await reload(page);
    await expectChart(page, "with an empty history", { points: 0, status: "none" });
    await queue(page);
    await expectChart(page, "out of the cache", finished);
    await page.unroute("**/blockskip/last_run*");

    await reload(page);
    await expectChart(page, "in Nodes 2.0", finished, { onPage: true });
    await picture(page, "vue");
    await page.evaluate(() => {
      const node = window.app.rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
      window.app.graph.convertToSubgraph(new Set([node]));
    });
    await page.waitForTimeout(500);
    await queue(page);
    await expectChart(page, "inside a subgraph", finished);
  } finally {
    await browser.close();
  }
  problems.forEach((problem) => console.log(`problem: ${problem}`));
  console.log(`chart: ${problems.length} problem(s)`);
  return problems.length ? 1 : 0;
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

/** Every value of the trainer is in its place and the chart has left none, in the workflow and in the prompt. */
function checkValues({ workflow, output }, inputs) {
  const node = workflow.nodes.find(({ type }) => type === "BlockSkip_TrainLora");
  if (node.widgets_values.includes(null)) problems.push(`a hole in ${JSON.stringify(node.widgets_values)}`);
  if (node.widgets_values.includes("")) problems.push(`the chart is in ${JSON.stringify(node.widgets_values)}`);
  const sent = Object.keys(Object.values(output).find((one) => one.class_type === "BlockSkip_TrainLora").inputs);
  if (sent.includes("loss_chart")) problems.push("the chart is in the prompt");
  const missing = inputs.filter((name) => !sent.includes(name));
  if (missing.length) problems.push(`inputs that got lost: ${missing}`);
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

/** The chart's state, wherever its node is; with its size on the page. */
function readChart() {
  const nodes = (graph) => (graph?.nodes ?? []).flatMap((node) => [node, ...nodes(node.subgraph)]);
  const trainer = nodes(window.app.rootGraph ?? window.app.graph).find((one) => one.comfyClass === "BlockSkip_TrainLora");
  const element = trainer?.widgets?.find((widget) => widget.name === "loss_chart")?.element;
  if (!element) return null;
  const { width, height } = element.getBoundingClientRect();
  return { points: Number(element.dataset.points), status: element.dataset.status, text: element.innerText, width, height };
}

async function expectChart(page, when, { points, status }, { onPage = false } = {}) {
  const deadline = Date.now() + 15_000;
  let chart = null;
  while (Date.now() < deadline) {
    chart = await page.evaluate(readChart);
    if (chart?.points === points && chart.status === status) break;
    await page.waitForTimeout(200);
  }
  if (chart?.points !== points || chart.status !== status) {
    problems.push(`${when}: expected ${points} points and ${status}, got ${JSON.stringify(chart)}`);
  } else if (onPage && !(chart.width > 100 && chart.height > 100)) {
    problems.push(`${when}: the chart is ${chart.width} x ${chart.height} px`);
  }
}

/** Bring the trainer into view. */
async function show(page) {
  await page.evaluate(() => {
    const { canvas } = window.app;
    const node = window.app.rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
    node.setSize([420, node.computeSize()[1]]);
    canvas.ds.scale = 1;
    canvas.ds.offset[0] = -node.pos[0] + 120;
    canvas.ds.offset[1] = -node.pos[1] + 100;
    canvas.setDirty(true, true);
  });
}

async function picture(page, name) {
  if (!options.screenshots) return;
  await page.addStyleTag({ content: ".p-toast, .p-dialog-mask { display: none !important; }" });
  await show(page);
  await page.waitForTimeout(1_000);
  await page.screenshot({ path: join(options.screenshots, `${name}.png`) });
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(error instanceof NotChecked ? `check_chart: ${error.message}` : error);
  process.exitCode = error instanceof NotChecked ? 2 : 1;
}
