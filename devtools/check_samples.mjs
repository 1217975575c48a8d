// Trains with samples in ComfyUI's real frontend, in a headless Chromium, and checks what the chart offers.
//
//   node devtools/check_samples.mjs SERVER PROMPT.json [--vue] [--screenshots DIR]
//
// PROMPT.json is an API-format prompt with Sample While Training. Checked are the strip of samples, the large view with its
// slider, the button that opens the summary, that the trainer's node keeps its size, and what the chart said on the way.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { readFileSync } from "node:fs";

import { pageCheck } from "./page_check.mjs";

const frame = pageCheck("samples", { needs: "the server's address and an API-format prompt", least: 2 });
const { problems, picture } = frame;

async function main(page, [file]) {
  const prompt = JSON.parse(readFileSync(file, "utf8"));
  const trainer = Object.values(prompt).find((node) => node.class_type === "BlockSkip_TrainLora");
  for (const node of Object.values(prompt)) { // nothing comes from an earlier run
    const isNew = ["BlockSkip_TrainLora", "BlockSkip_PrecomputeResiduals"].includes(node.class_type);
    if (isNew) node.inputs.seed = Math.floor(Math.random() * 1e9);
  }
  await page.evaluate((graph) => window.app.loadApiJson(graph, "samples"), prompt);
  await page.waitForTimeout(1_000);
  const size = await page.evaluate(show);
  const heads = await run(page);
  await page.waitForTimeout(1_000);
  await picture(page, "samples");
  checkHeads(heads);
  const after = await page.evaluate(() => [...window.trainer.size]);
  if (JSON.stringify(after) !== JSON.stringify(size)) problems.push(`the node went from ${size} to ${after}`);
  const shown = await page.evaluate(() => document.querySelectorAll(".image-preview img, .lg-node img:not(.blockskip-samples img)").length);
  if (shown) problems.push(`the node shows ${shown} pictures outside the chart`);
  await checkStrip(page, trainer.inputs.steps);
  await checkSummary(page.context(), page);
}

/** Bring the trainer into view and return its size. */
function show() {
  const { canvas, rootGraph } = window.app;
  const node = rootGraph.nodes.find(({ comfyClass }) => comfyClass === "BlockSkip_TrainLora");
  window.trainer = node;
  node.setSize([400, node.computeSize()[1] + 60]);
  Object.assign(canvas.ds, { scale: 1, offset: [-node.pos[0] + 150, -node.pos[1] + 150] });
  canvas.setDirty(true, true);
  return [...node.size];
}

/** Run the trainer; return every headline of its chart, also those between two frames of a busy page. */
async function run(page) {
  return page.evaluate(async () => {
    const heads = new Set();
    const module = performance.getEntriesByType("resource").find(({ name }) => name.includes("/loss_chart.js")).name;
    const chart = (await import(module)).LossChart.prototype;
    const { redraw } = chart;
    chart.redraw = function () {
      this.tell();
      heads.add(this.head.textContent);
      redraw.call(this);
    };
    return new Promise((resolve) => {
      for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
        window.app.api.addEventListener(kind, ({ detail }) => {
          chart.redraw = redraw;
          heads.add(detail.exception_message ?? kind);
          resolve([...heads]);
        });
      }
      window.app.queuePrompt(0, 1, [String(window.trainer.id)]);
    });
  });
}

function checkHeads(heads) {
  if (!heads.includes("execution_success")) problems.push(`the run ended with ${heads.at(-1)}`);
  for (const wanted of [/^Precomputing · computing residuals \d+ of \d+$/, /^Sampling \d+ of \d+/, /^Training · step \d+ of \d+ · .+ left$/]) {
    if (!heads.some((head) => wanted.test(head))) problems.push(`no headline is like ${wanted}: ${JSON.stringify(heads)}`);
  }
}

async function checkStrip(page, steps) {
  const labels = await page.locator(".blockskip-samples button").allInnerTexts();
  if (labels[0] !== "0" || labels.at(-1) !== String(steps)) problems.push(`the samples are ${labels}`);
  const widths = await page.locator(".blockskip-samples img").evaluateAll((all) => all.map((one) => one.naturalWidth));
  if (widths.includes(0)) problems.push(`a sample is no picture: ${widths}`);
  const strip = await page.evaluate(() => {
    const [inner, outer] = [".blockskip-samples", ".blockskip-chart"].map((one) => document.querySelector(one).getBoundingClientRect());
    return inner.top >= outer.top && inner.bottom <= outer.bottom + 1;
  });
  if (!strip) problems.push("the strip is outside the chart");
  await page.locator(".blockskip-samples button").last().click();
  const view = page.locator("dialog.blockskip-compare");
  await view.waitFor({ timeout: 5_000 });
  const slider = view.locator("input[type=range]");
  const clip = () => view.locator("img").last().evaluate((image) => image.style.clipPath);
  const before = await clip();
  await slider.fill("10");
  if ((await clip()) === before) problems.push("the slider uncovers nothing");
  await picture(page, "compare");
  const told = () => view.innerText();
  const last = await told();
  if (!last.includes(`step ${steps}`)) problems.push(`the large view says ${last}`);
  await view.getByRole("button").focus();
  await page.keyboard.press("ArrowLeft");
  if ((await told()) === last) problems.push("an arrow key shows no other sample");
  await page.keyboard.press("Escape");
  await page.waitForTimeout(200);
  if (await view.count()) problems.push("the large view stays open");
}

async function checkSummary(context, page) {
  const [summary] = await Promise.all([
    context.waitForEvent("page", { timeout: 10_000 }),
    page.locator(".blockskip-summary").click({ timeout: 5_000 }),
  ]);
  await summary.waitForLoadState();
  const text = await summary.locator("body").innerText();
  if (!/self-check/i.test(text)) problems.push(`the summary says ${text.slice(0, 200)}`);
  const pictures = await summary.locator("img").evaluateAll((all) => all.map((one) => one.naturalWidth));
  if (!pictures.length || pictures.includes(0)) problems.push(`the summary's pictures are ${pictures} px wide`);
}

await frame.run({ width: 1200, height: 1000 }, main);
