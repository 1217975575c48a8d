// ComfyUI's real frontend in a headless Chromium, for the tools beside this file.
//
// They need `npm install --prefix ~/.cache/blockskip/node playwright-core` and a Chromium on PATH.

import { execFileSync } from "node:child_process";
import { createRequire } from "node:module";
import { homedir } from "node:os";
import { join } from "node:path";

const SETTINGS = {
  "Comfy.TutorialCompleted": true,
  "Comfy.Workflow.Persist": false,
  "Comfy.Validation.Workflows": true, // schema errors are shown as toasts
  "Comfy.Workflow.ShowMissingModelsWarning": false,
  "Comfy.Minimap.Visible": false,
  "Comfy.Graph.CanvasInfo": false,
  "LiteGraph.Canvas.MinFontSizeForLOD": 0, // draw text at any zoom
};
const BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chrome"];
const BROWSER_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
const HARMLESS = [
  /user\.css/,
  /userdata/,
  /favicon/,
  /MaskEditor/i,
  /graph accessed before initialization/,
  /legacy queue\/history menu/,
  /missingModelDownload/, // it looks up the sizes of models, which the server's security policy blocks
];
const WATCHED_ADDRESSES = /\/extensions\/|\/docs\/|workflow_templates/;

/** Nothing could be checked, as opposed to a fault that was found. */
export class NotChecked extends Error {}

/** Apply the settings that make the page quiet and strict; call this before the page opens. */
export async function configure(server, further = {}) {
  for (const [key, value] of Object.entries({ ...SETTINGS, ...further })) {
    const reply = await fetch(`${server}/api/settings/${key}`, { method: "POST", body: JSON.stringify(value) });
    if (!reply.ok) throw new NotChecked(`the server refused the setting ${key}: ${reply.status}`);
  }
}

/** Launch a headless Chromium. */
export async function launch({ browser, modules } = {}) {
  const cache = process.env.XDG_CACHE_HOME ?? join(homedir(), ".cache");
  const folder = modules ?? join(cache, "blockskip", "node");
  let chromium;
  try {
    ({ chromium } = createRequire(join(folder, "index.js"))("playwright-core"));
  } catch {
    throw new NotChecked(`playwright-core is not installed in ${folder}`);
  }
  return chromium.launch({ executablePath: browser ?? findBrowser(), args: BROWSER_FLAGS });
}

function findBrowser() {
  for (const name of BROWSERS) {
    try {
      return execFileSync("which", [name], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
    } catch {
      continue;
    }
  }
  throw new NotChecked("no Chromium on PATH: pass one with --browser");
}

/** Collect the page's errors and warnings from now on. */
export function listen(page, { problems }) {
  const complain = (kind, text) => {
    if (!HARMLESS.some((pattern) => pattern.test(text))) problems.push(`${kind}: ${text}`);
  };
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) {
      complain(`console ${message.type()}`, `${message.text()} ${message.location().url ?? ""}`.trim());
    }
  });
  page.on("pageerror", (error) => complain("page error", error.message));
  page.on("response", (reply) => {
    if (reply.status() >= 400 && WATCHED_ADDRESSES.test(reply.url())) {
      complain("request", `${reply.url()} answered ${reply.status()}`);
    }
  });
}

/** Wait until the page has requested nothing, and its graph has not changed, for a while. */
export async function settle(page, { quiet = 300 } = {}) {
  let last = Date.now();
  const look = () => (last = Date.now());
  page.on("request", look).on("response", look);
  const graph = () => page.evaluate(() => JSON.stringify((window.app.rootGraph ?? window.app.graph).serialize()));
  const deadline = last + 30_000;
  let before = await graph();
  while (Date.now() - last < quiet) {
    if (Date.now() > deadline) throw new NotChecked("the page is still loading after 30 seconds");
    await page.waitForTimeout(100);
    const now = await graph();
    if (now !== before) look();
    before = now;
  }
  page.off("request", look).off("response", look);
}

/** Open a template of a pack, as the template browser does, which is slow to open. */
export async function openTemplate(page, pack, name) {
  await page.evaluate(async ([folder, title]) => {
    const reply = await window.app.api.fetchApi(`/workflow_templates/${folder}/${encodeURIComponent(title)}.json`);
    if (!reply.ok) throw new Error(`the template was answered with ${reply.status}`);
    await window.app.loadGraphData(await reply.json(), true, true, title);
  }, [pack, name]);
  await settle(page);
}

/** Set widgets as typing does; `values` are by kind of node and widget. */
export async function setWidgets(page, values) {
  await page.evaluate((given) => {
    for (const node of window.app.rootGraph.nodes) {
      for (const [name, value] of Object.entries(given[node.comfyClass] ?? {})) {
        const widget = node.widgets.find((one) => one.name === name);
        if (!widget) throw new Error(`${node.comfyClass} has no widget ${name}`);
        widget.value = value;
        widget.callback?.(value);
      }
    }
  }, values);
}

/** Open the frontend and wait until it is ready. */
export async function open(page, server) {
  await page.goto(server);
  await page.waitForFunction(() => window.app?.graph && window.app?.extensionManager, null, { timeout: 60_000 });
  await page.waitForTimeout(1_000);
}
