// Makes mistakes in ComfyUI's real frontend, in a headless Chromium, and checks what the user is told.
//
//   node devtools/check_errors.mjs SERVER PROMPT.json [--vue] [--screenshots DIR]
//
// PROMPT.json is an API-format prompt with one trainer that takes a minute or more. Checked are: an error while a node runs,
// a mistake that is refused when the graph is queued, and Cancel. Each must be told in a toast, in our words, and on the
// trainer's chart; errors with a link that opens the node's help page at the message. A server that has ended must be told on
// the chart. An error in a workflow that is no longer open is told without the open one's nodes, though they have the same ids,
// also when the page was reloaded since it was queued.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";

import { open } from "./browser.mjs";
import { pageCheck } from "./page_check.mjs";

const TOLD = { timeout: 20_000 };
const frame = pageCheck("errors", { needs: "the server's address and an API-format prompt", least: 2 });
const { problems, picture } = frame;

async function main(page, [file]) {
  const prompt = JSON.parse(readFileSync(file, "utf8"));
  await whileRunning(page, prompt);
  await whenQueued(page, prompt);
  await cancelled(page, prompt);
  await elsewhere(page, prompt);
}

/** A node raises an error: more blocks to skip than the model has. */
async function whileRunning(page, prompt) {
  await load(page, changed(prompt, "BlockSkip_SelectBlocks", { method: "manual", front: 900, back: 100 }));
  await page.evaluate(() => void window.app.queuePrompt(0, 1));
  const toast = await told(page, "Skipping the first 900");
  await expect(page, "run-time error", toast, { title: /^BlockSkip: /, link: true, chart: /first 900/ });
  const type = await page.evaluate(() => window.app.extensionManager.lastExecutionError?.exception_type);
  if (type !== "BlockSkip.InvalidInputError") problems.push(`the error is called ${type}`);
  await picture(page, "error");
  await help(page, "leaves none");
}

/** A widget has a value that cannot be used: nothing runs. */
async function whenQueued(page, prompt) {
  await load(page, changed(prompt, "BlockSkip_TrainLora", { output_name: "../elsewhere" }));
  const started = page.evaluate(
    () => new Promise((resolve) => window.app.api.addEventListener("execution_start", () => resolve(true))),
  );
  await page.evaluate(() => void window.app.queuePrompt(0, 1));
  const toast = await told(page, "must stay inside ComfyUI's output folder");
  await expect(page, "refused widget", toast, { title: /^BlockSkip: /, link: true, chart: /must stay inside/ });
  const ran = await Promise.race([started, page.waitForTimeout(1_000).then(() => false)]);
  if (ran) problems.push("refused widget: the graph was run");
  await picture(page, "refused");
}

async function cancelled(page, prompt) {
  await load(page, changed(prompt, "BlockSkip_TrainLora", { steps: 5_000, seed: Math.floor(Math.random() * 1e9) }));
  await page.evaluate(() => void window.app.queuePrompt(0, 1));
  await training(page);
  await lost(page);
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Interrupt"));
  const toast = await told(page, "Cancelled at step");
  const said = /^Cancelled at step \d+ of 5000\. Checkpoint saved as \S+\.safetensors; queue again to resume\.$/;
  if (toast && !said.test(toast.text)) problems.push(`cancel: the toast says ${toast.text}`);
  await expect(page, "cancel", toast, { title: /cancelled/, link: false, chart: said });
  await picture(page, "cancelled");
}

/** Wait until the chart follows this run: it may still show an earlier one. */
async function training(page) {
  await page.waitForFunction(
    () => /^Training · step \d+ of 5,?000/.test(document.querySelector(".blockskip-head")?.textContent ?? ""), null, { timeout: 120_000 },
  );
}

/** The page is told nothing more of a run, and a server that it finds again does not know it. */
async function lost(page) {
  await page.route("**/blockskip/last_run*", (route) => route.fulfill({ json: { run: null } }));
  await page.evaluate(() => {
    const { dispatchEvent } = EventTarget.prototype;
    window.listenAgain = () => (EventTarget.prototype.dispatchEvent = dispatchEvent);
    EventTarget.prototype.dispatchEvent = function (event) {
      return event.type === "blockskip.train" || dispatchEvent.call(this, event);
    };
    window.app.api.dispatchEvent(new CustomEvent("reconnected"));
  });
  const said = await page.waitForFunction(() => {
    const [head, message] = ["head", "message"].map((part) => document.querySelector(`.blockskip-${part}`)?.textContent);
    return /^The server stopped/.test(head) && message;
  }, null, TOLD).then((found) => found.jsonValue(), () => "");
  if (said !== "Queue again: the run resumes from its last checkpoint.") problems.push(`a server that ended: the chart says ${said}`);
  await picture(page, "lost");
  await page.unroute("**/blockskip/last_run*");
  await page.evaluate(() => window.listenAgain());
  await training(page);
}

/** Two prompts wait for others, and fail when another workflow is open; before the second the page is reloaded. */
async function elsewhere(page, prompt) {
  for (const front of [801, 802]) {
    const seed = Math.floor(Math.random() * 1e9);
    await queue(page, changed(prompt, "BlockSkip_TrainLora", { steps: 5_000, seed }));
    await queue(page, changed(prompt, "BlockSkip_SelectBlocks", { method: "manual", front, back: 100 }));
  }
  for (const [front, waiting] of [[801, 3], [802, 1]]) {
    if (front === 802) await open(page, page.url());
    await load(page, prompt);
    await page.waitForFunction(async (count) => (await window.app.api.getQueue()).Pending.length === count, waiting, TOLD);
    await page.evaluate(() => void window.app.extensionManager.command.execute("Comfy.Interrupt"));
    const toast = await told(page, `Skipping the first ${front}`);
    await expect(page, `error ${front} elsewhere`, toast, { title: /^BlockSkip: Select Blocks \(.*\) in another workflow$/, link: true, chart: /^(?!.*Skipping the first)/ });
    const head = await page.locator(".blockskip-head").first().innerText(); // an earlier run of that node, or none
    if (/^Stopped/.test(head)) problems.push(`error ${front} elsewhere: the chart says ${head}`);
    await picture(page, `elsewhere-${front}`);
  }
}

async function queue(page, prompt) {
  await load(page, prompt);
  await page.evaluate(() => window.app.queuePrompt(0, 1));
}

function changed(prompt, type, inputs) {
  return Object.fromEntries(
    Object.entries(prompt).map(([id, node]) => [
      id, node.class_type === type ? { ...node, inputs: { ...node.inputs, ...inputs } } : node,
    ]),
  );
}

async function load(page, prompt) {
  await page.evaluate(() => window.app.extensionManager.toast.removeAll());
  await page.evaluate((graph) => window.app.loadApiJson(graph, "errors"), prompt);
  await page.waitForTimeout(1_000);
  const { workflow } = await page.evaluate(() => window.app.graphToPrompt());
  await page.evaluate((graph) => window.app.loadGraphData(graph), { ...workflow, id: randomUUID() });
  await page.waitForTimeout(500);
}

/** Wait for a toast with these words; return it, or null after noting the problem. */
async function told(page, words) {
  const toast = page.locator(".p-toast-message", { hasText: words }).first();
  try {
    await toast.waitFor(TOLD);
  } catch {
    const all = await page.locator(".p-toast-message").allInnerTexts();
    problems.push(`no toast says "${words}"; the toasts are ${JSON.stringify(all)}`);
    await picture(page, "missing");
    return null;
  }
  await page.waitForTimeout(400);
  return {
    title: await toast.locator(".p-toast-summary").innerText(),
    text: await toast.locator(".p-toast-detail").innerText(),
    links: await toast.locator(".blockskip-help-link").count(),
  };
}

async function expect(page, when, toast, { title, link, chart }) {
  if (!toast) return;
  if (!title.test(toast.title)) problems.push(`${when}: the toast is titled ${toast.title}`);
  if (/custom_nodes|Error\b/.test(toast.title + toast.text)) problems.push(`${when}: the toast says ${toast.text}`);
  if (toast.links !== Number(link)) problems.push(`${when}: the toast has ${toast.links} link(s)`);
  const message = await page.evaluate(() => document.querySelector(".blockskip-message")?.textContent ?? "");
  if (!chart.test(message.trim())) problems.push(`${when}: the chart says ${JSON.stringify(message)}`);
}

/** The toast's link opens the help page, and the row about the message is marked. */
async function help(page, quoted) {
  const link = page.locator(".blockskip-help-link").first();
  if (!(await link.count())) return;
  await link.click();
  const dialog = page.locator("dialog.blockskip-help");
  await dialog.locator("h1").waitFor(TOLD);
  await page.waitForTimeout(300);
  const marked = await dialog.locator("tr[style]").allInnerTexts();
  if (marked.length !== 1 || !marked[0].includes(quoted)) problems.push(`help: marked rows ${JSON.stringify(marked)}`);
  await picture(page, "help");
  await dialog.getByRole("button").first().click();
  if (await dialog.count()) problems.push("help: it stays open");
}

await frame.run({ width: 1500, height: 1000 }, main, { listens: false });
