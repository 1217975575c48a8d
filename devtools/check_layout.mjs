// Opens workflows in ComfyUI's real frontend, in a headless Chromium, and checks that no node lies on another.
//
//   node devtools/check_layout.mjs SERVER WORKFLOW.json [MORE.json ...] [--vue] [--twins DIR] [--screenshots DIR]
//
// Measured are the nodes' rectangles on the page when a workflow is opened and, if DIR has a prompt of the same name
// (`--twins`), while that prompt runs in the place of the workflow's own, and after it. Nodes of a prompt have the ids of the
// workflow's nodes, so that what the run shows appears on them.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { existsSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

import { settle } from "./browser.mjs";
import { pageCheck } from "./page_check.mjs";

const LONGEST_RUN = 400_000; // ms
const frame = pageCheck("layout", { needs: "the server's address and workflows", least: 2, further: { twins: { type: "string" } } });
const { options, problems, picture } = frame;

async function main(page, files) {
  for (const file of files) await check(page, file);
}

async function check(page, file) {
  const name = basename(file, ".json");
  await page.evaluate(async ([graph, title]) => {
    await window.app.loadGraphData(graph, true, true, title);
    document.querySelectorAll(".p-dialog-mask").forEach((mask) => mask.remove());
  }, [JSON.parse(readFileSync(file, "utf8")), name]);
  await settle(page);
  await page.evaluate(fit);
  await page.waitForTimeout(500);
  const found = new Set();
  await measure(page, found, `${name}, opened`);
  await picture(page, `${name}-opened`);
  const twin = options.twins && join(options.twins, `${name}.json`);
  if (twin && existsSync(twin)) await run(page, found, name, JSON.parse(readFileSync(twin, "utf8")));
}

/** Run a prompt in the place of the page's own, and measure all the time. */
async function run(page, found, name, prompt) {
  await page.route("**/prompt", async (route) => {
    if (route.request().method() !== "POST") return route.continue();
    const body = JSON.parse(route.request().postData());
    return route.continue({ postData: JSON.stringify({ ...body, prompt }) });
  });
  await page.evaluate(() => {
    window.ended = "";
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
      window.app.api.addEventListener(kind, ({ detail }) => (window.ended = `${kind} ${detail.exception_message ?? ""}`));
    }
    void window.app.queuePrompt(0, 1);
  });
  const end = Date.now() + LONGEST_RUN;
  while (!(await page.evaluate(() => window.ended)) && Date.now() < end) {
    await measure(page, found, `${name}, while it runs`);
    await page.waitForTimeout(250);
  }
  const ended = await page.evaluate(() => window.ended);
  if (!ended.startsWith("execution_success")) problems.push(`${name}: ${ended || "the run did not end"}`);
  await page.waitForTimeout(1_500);
  await measure(page, found, `${name}, after the run`);
  await picture(page, `${name}-after`);
  await page.unroute("**/prompt");
}

async function measure(page, found, when) {
  for (const overlap of await page.evaluate(overlaps, options.vue)) {
    if (found.has(overlap)) continue;
    found.add(overlap);
    problems.push(`${when}: ${overlap}`);
  }
}

/** Show the whole graph. */
function fit() {
  const { canvas, rootGraph } = window.app;
  const boxes = [...rootGraph.nodes, ...rootGraph.groups].map((item) => item.boundingRect);
  const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])));
  const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])));
  const scale = Math.min(1450 / (right - left), 850 / (bottom - top), 1);
  canvas.ds.scale = scale;
  Object.assign(canvas.ds.offset, [80 / scale - left, 90 / scale - top]);
  canvas.setDirty(true, true);
}

/** Pairs of nodes that lie on each other, and elements that reach below their node, in words. */
function overlaps(isVue) {
  const { canvas, rootGraph } = window.app;
  const places = rootGraph.nodes.map((node) => {
    const shown = isVue && document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    const { scale } = canvas.ds;
    const box = shown ? [shown.x / scale, shown.y / scale, shown.width / scale, shown.height / scale] : [...node.boundingRect];
    return { title: `${node.title} (${node.id})`, box };
  });
  const found = [];
  for (const [place, { title, box }] of places.entries()) {
    for (const other of places.slice(place + 1)) {
      const wide = Math.min(box[0] + box[2], other.box[0] + other.box[2]) - Math.max(box[0], other.box[0]);
      const high = Math.min(box[1] + box[3], other.box[1] + other.box[3]) - Math.max(box[1], other.box[1]);
      if (wide > 2 && high > 2) found.push(`${title} and ${other.title} overlap`);
    }
  }
  const room = canvas.canvas.getBoundingClientRect();
  for (const node of isVue ? [] : rootGraph.nodes) {
    for (const { element } of node.widgets ?? []) {
      const drawn = element?.isConnected && element.getBoundingClientRect();
      const bottom = room.y + (node.pos[1] + node.size[1] + canvas.ds.offset[1]) * canvas.ds.scale;
      if (drawn?.height && drawn.bottom > bottom + 3) found.push(`${node.title} (${node.id}) is shorter than what it shows`);
    }
  }
  return found;
}

await frame.run({ width: 1600, height: 1000 }, main, { listens: false });
