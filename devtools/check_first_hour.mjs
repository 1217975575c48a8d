// A user's first hour in ComfyUI's real frontend, in a headless Chromium, shortened by small numbers.
//
//   node devtools/check_first_hour.mjs SERVER [--vue] [--screenshots DIR]
//
// The server needs the demo's nodes, models and pictures. A user opens the template "BlockSkip 0 - Try it without a GPU",
// types a name that cannot be used and reads why, runs, asks for a sample, cancels, runs again, which resumes, opens the
// summary, and compares a picture without and with the LoRA, all with the page's own buttons. And the template, opened twice, is
// two workflows, each with an id of its own that it keeps.
// The exit status is 1 if something is wrong, 2 if it could not be checked.

import { openTemplate, setWidgets, settle } from "./browser.mjs";
import { pageCheck } from "./page_check.mjs";

const TEMPLATE = "BlockSkip 0 - Try it without a GPU";
const STEPS = 60;
const SMALL = {
  BlockSkip_MemoryPlan: { patch_min: 64, batch_size: 2 },
  BlockSkip_PrecomputeResiduals: { draws: 8, patch_max: 128 },
  BlockSkip_SampleWhileTraining: { every: STEPS, width: 64, height: 64, sampler_steps: 2 },
  BlockSkip_TrainLora: { steps: STEPS },
  EmptySD3LatentImage: { width: 64, height: 64 },
  KSampler: { steps: 2 },
};
const SOON = { timeout: 60_000 };
const RUN = { timeout: 300_000 };

const frame = pageCheck("first_hour", { needs: "the server's address", least: 1 });
const { problems, picture } = frame;

async function main(page) {
  await twice(page);
  await begin(page);
  await mistake(page);
  await cancelled(page);
  await resumed(page);
  await summary(page);
  await compared(page);
}

/** The server keeps runs by the workflow's id, so two from one template must not share it. */
async function twice(page) {
  const idOf = () => page.evaluate(() => window.app.rootGraph.id);
  const ids = [];
  for (let time = 0; time < 2; time += 1) {
    await openTemplate(page, "blockskip_demo_nodes", TEMPLATE);
    ids.push(await idOf());
  }
  if (ids[0] === ids[1]) problems.push(`the template, opened twice, is ${ids[0]} both times`);
  await page.evaluate(() => window.app.extensionManager.command.execute("Workspace.PreviousOpenedWorkflow"));
  await settle(page);
  if ((await idOf()) !== ids[0]) problems.push(`the first of two workflows became ${await idOf()}`);
  await page.evaluate(() => window.app.loadGraphData(window.app.rootGraph.serialize(), true, true, "from a file", { openSource: "file_button" }));
  if ((await idOf()) !== ids[0]) problems.push(`opened from a file, ${ids[0]} became ${await idOf()}`);
}

async function begin(page) {
  await openTemplate(page, "blockskip_demo_nodes", TEMPLATE);
  await setWidgets(page, SMALL);
  await page.evaluate(() => {
    const seed = window.app.rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora").widgets.find((one) => one.name === "seed");
    seed.value = Math.floor(Math.random() * 1e9); // no run of an earlier check
  });
  await show(page, "BlockSkip_TrainLora");
}

/** A name outside the output folder is refused when the graph is queued. */
async function mistake(page) {
  const typed = await set(page, "output_name", "../elsewhere");
  await press(page, "queue-button");
  const toast = await told(page, "must stay inside ComfyUI's output folder");
  await picture(page, "1-mistake");
  if (toast && !(await toast.locator(".blockskip-help-link").count())) problems.push("mistake: the toast has no link to the help page");
  await set(page, "output_name", typed);
  await page.evaluate(() => window.app.extensionManager.toast.removeAll());
}

/** Run, ask for a sample, and cancel once it is there. */
async function cancelled(page) {
  await press(page, "queue-button");
  const button = page.locator(".blockskip-sample-now");
  await headline(page, /^Training · step \d/);
  await clickOn(page, button);
  await page.waitForFunction(() => document.querySelectorAll(".blockskip-samples button").length >= 2, null, RUN);
  await picture(page, "2-sample-now");
  await clickOn(page, page.getByRole("button", { name: "Cancel current run" }));
  const toast = await told(page, "Cancelled at step");
  const said = toast && (await toast.locator(".p-toast-detail").innerText());
  const wanted = new RegExp(`^Cancelled at step \\d+ of ${STEPS}\\. Checkpoint saved as \\S+; queue again to resume\\.$`);
  if (toast && !wanted.test(said)) problems.push(`cancel: the toast says ${said}`);
  await page.waitForTimeout(500);
  await picture(page, "3-cancelled");
  if (await button.isVisible()) problems.push("cancel: the button for a sample is still there");
}

/** Running again makes the other steps only. */
async function resumed(page) {
  const before = await stepOf(page);
  await press(page, "queue-button");
  await headline(page, /^Done/);
  const steps = await page.locator(".blockskip-samples button").allInnerTexts();
  if (before >= STEPS) problems.push(`resume: the first run was not cancelled before its end, at step ${before}`);
  if (!steps.some((label) => label.startsWith(String(STEPS)))) problems.push(`resume: the samples are ${steps}`);
  await picture(page, "4-resumed");
}

async function summary(page) {
  const [opened] = await Promise.all([page.context().waitForEvent("page", SOON), clickOn(page, page.locator(".blockskip-summary"))]);
  await opened.waitForLoadState();
  const words = await opened.locator("body").innerText();
  if (!/Resumed at\s+step \d/.test(words)) problems.push(`the summary does not say where the run resumed: ${words.slice(0, 400)}`);
  await picture(opened, "5-summary");
  await opened.close();
}

/** The slider on Compare Pictures: by its knob, by dragging on the picture, and in the large view. */
async function compared(page) {
  await page.waitForFunction(() => document.querySelector(".blockskip-comparison")?.dataset.pairs === "1", null, RUN);
  await show(page, "BlockSkip_Compare");
  const box = page.locator(".blockskip-comparison");
  const [after, before] = [box.locator("img").first(), box.locator("img").last()];
  for (const image of [after, before]) {
    await image.evaluate((one) => one.decode());
    if (!(await image.evaluate((one) => one.naturalWidth))) problems.push("compare: a picture is missing");
  }
  const sources = [await after.getAttribute("src"), await before.getAttribute("src")];
  if (sources[0] === sources[1]) problems.push("compare: both pictures are the same file");
  const clip = () => before.evaluate((one) => one.style.clipPath);
  const place = await rectangle(box);
  const stage = await rectangle(after);
  if (!(stage.height > 0.5 * place.height)) problems.push(`compare: the picture is ${stage.height} of ${place.height} px high`);
  const nodeAt = () => page.evaluate(() => [...window.shown.pos]);
  const [clips, at] = [[await clip()], await nodeAt()];
  await page.mouse.move(stage.x + stage.width / 2, stage.y + stage.height / 2);
  await page.mouse.down();
  await page.mouse.move(stage.x + stage.width / 4, stage.y + stage.height / 2, { steps: 4 });
  await page.mouse.up();
  clips.push(await clip());
  await picture(page, "6-compared");
  await box.locator("input[type=range]").fill("90");
  clips.push(await clip());
  if (new Set(clips).size < 3) problems.push(`compare: the slider uncovers nothing: ${clips}`);
  if (!/inset\(0(px)? 7[45]/.test(clips[1])) problems.push(`compare: dragged to a quarter, the picture is cut at ${clips[1]}`);
  if (String(await nodeAt()) !== String(at)) problems.push("compare: dragging on the picture moves the node");
  await clickOn(page, box.getByText("Enlarge"));
  await page.locator("dialog.blockskip-compare img").first().waitFor(SOON);
  await page.waitForTimeout(300);
  await picture(page, "7-large");
  await page.keyboard.press("Escape");
}

async function press(page, button) {
  await clickOn(page, page.getByTestId(button));
}

/** Click in the middle of an element, as a hand does, without waiting for a busy page to come to rest. */
async function clickOn(page, element) {
  await element.waitFor(SOON);
  const { x, y, width, height } = await rectangle(element);
  await page.mouse.click(x + width / 2, y + height / 2);
}

/** An element's place on the page. Playwright's own call for it does not return from a page that is drawn all the time. */
async function rectangle(element) {
  return element.evaluate((one) => one.getBoundingClientRect().toJSON());
}

/** Set a widget of the trainer, as typing does; return what it was. */
async function set(page, name, value) {
  return page.evaluate(([widgetName, to]) => {
    const node = window.app.rootGraph.nodes.find((one) => one.comfyClass === "BlockSkip_TrainLora");
    const widget = node.widgets.find((one) => one.name === widgetName);
    const before = widget.value;
    widget.value = to;
    widget.callback?.(to);
    return before;
  }, [name, value]);
}

async function told(page, words) {
  const toast = page.locator(".p-toast-message", { hasText: words }).first();
  try {
    await toast.waitFor(RUN);
    await page.waitForTimeout(400);
    return toast;
  } catch {
    problems.push(`no toast says "${words}"; the toasts are ${JSON.stringify(await page.locator(".p-toast-message").allInnerTexts())}`);
    await picture(page, "missing");
    return null;
  }
}

async function headline(page, wanted) {
  try {
    await page.waitForFunction((text) => new RegExp(text).test(document.querySelector(".blockskip-head")?.textContent ?? ""), wanted.source, RUN);
  } catch {
    await picture(page, "missing");
    throw new Error(`the chart says ${await page.locator(".blockskip-chart").innerText()}, not ${wanted}`);
  }
}

async function stepOf(page) {
  const words = await page.locator(".blockskip-head").innerText();
  return Number(words.match(/step (\d+)/)?.[1] ?? NaN);
}

/** Bring a node into view. */
async function show(page, kind) {
  await page.evaluate((comfyClass) => {
    const { canvas, rootGraph } = window.app;
    window.shown = rootGraph.nodes.find((node) => node.comfyClass === comfyClass);
    Object.assign(canvas.ds, { scale: 0.8, offset: [-window.shown.pos[0] + 250, -window.shown.pos[1] + 150] });
    canvas.setDirty(true, true);
  }, kind);
  await page.waitForTimeout(500);
}

await frame.run({ width: 1000, height: 860 }, main, { listens: false });
