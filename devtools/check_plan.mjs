// Runs Memory Plan in ComfyUI's real frontend, in a headless Chromium, and checks what its node shows.
//
//   node devtools/check_plan.mjs SERVER PROMPT.json [--vue] [--screenshots DIR]
//
// PROMPT.json is an API-format prompt with Memory Plan and a trainer that uses its settings. Only the plan is run, for a card
// that is too small for the settings. Checked are the sentence, the bars, that nothing reaches over the node's edge, that the
// node keeps its size, and that the phase which does not run is hatched.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { readFileSync } from "node:fs";

import { pageCheck } from "./page_check.mjs";

const frame = pageCheck("plan", { needs: "the server's address and an API-format prompt", least: 2 });
const { options, problems, picture } = frame;

async function main(page, [file]) {
  await page.evaluate((graph) => window.app.loadApiJson(graph, "plan"), JSON.parse(readFileSync(file, "utf8")));
  await page.waitForTimeout(1_000);
  const before = await page.evaluate(prepare);
  await picture(page, "plan-before");
  const id = await page.evaluate(() => window.plan.id);
  await page.evaluate((node) => void window.app.queuePrompt(0, 1, [String(node)]), id);
  await page.locator(".blockskip-verdict").waitFor({ timeout: 120_000 });
  await page.waitForTimeout(1_000);
  await picture(page, "plan-after");
  check(await page.evaluate(look), before);
}

/** Bring the plan's node into view, at a size that users have, with a card that is too small. */
function prepare() {
  const { canvas, rootGraph } = window.app;
  const node = rootGraph.nodes.find(({ comfyClass }) => comfyClass === "BlockSkip_MemoryPlan");
  window.plan = node;
  const set = (name, value) => (node.widgets.find((widget) => widget.name === name).value = value);
  set("preset", "off");
  set("card_memory", 0.012);
  set("batch_size", 8);
  set("checkpointing", false);
  node.setSize([400, node.computeSize()[1]]);
  Object.assign(canvas.ds, { scale: 1, offset: [-node.pos[0] + 150, -node.pos[1] + 150] });
  canvas.setDirty(true, true);
  return node.size[1];
}

function look() {
  const box = document.querySelector(".blockskip-plan");
  const edge = box.getBoundingClientRect();
  const over = [...box.querySelectorAll("*")].filter((part) => part.getBoundingClientRect().right > edge.right + 1);
  const bars = [...box.querySelectorAll(".blockskip-bar")].map(({ innerText }) => innerText);
  const margins = [...box.querySelectorAll(".blockskip-margin")].map((part) => part.getBoundingClientRect().width);
  const skipped = [...box.querySelectorAll(".blockskip-skipped")].map(({ innerText }) => innerText);
  return {
    verdict: box.querySelector(".blockskip-verdict").textContent,
    bars, margins, skipped, over: over.length, width: edge.width, height: window.plan.size[1],
    cut: box.scrollHeight > box.clientHeight + 1,
  };
}

function check(seen, before) {
  const said = /^Needs [\d.]+ [MG]iB as set, you have [\d.]+ [MG]iB\. This run uses .+: [\d.]+ [MG]iB, fits\.( Room to train .+)?$/;
  if (!said.test(seen.verdict)) problems.push(`the node says ${seen.verdict}`);
  if (seen.bars.length < 4) problems.push(`the bars are ${JSON.stringify(seen.bars)}`);
  if (!seen.margins.length || Math.min(...seen.margins) <= 0) problems.push(`the margin is ${JSON.stringify(seen.margins)} px wide`);
  if (seen.skipped.length !== 1 || !seen.skipped[0].includes("not run")) problems.push(`not run: ${JSON.stringify(seen.skipped)}`);
  if (seen.over || seen.cut) problems.push(`something reaches over the edge: ${JSON.stringify(seen)}`);
  if (!options.vue && seen.height !== before) problems.push(`the node grew from ${before} px to ${seen.height} px`);
}

await frame.run({ width: 1200, height: 1000 }, main);
