// What the tools that check our part of the page have in common: their options, the page, pictures of it, and how they end.

import { join } from "node:path";
import { parseArgs } from "node:util";

import { NotChecked, configure, launch, listen, open } from "./browser.mjs";

/**
 * Begin a check; its options are `--vue`, `--screenshots DIR` and `further` ones.
 *
 * `needs` says what must be given, `least` is the number of arguments. Returned are the options, the list that problems are
 * added to, `picture(page, name)`, and `run(viewport, body)`, which calls `body(page, files)` and ends the process.
 */
export function pageCheck(name, { needs, least, further = {} }) {
  const problems = [];
  const { values: options, positionals } = parseArgs({
    allowPositionals: true,
    options: { vue: { type: "boolean", default: false }, screenshots: { type: "string" }, ...further },
  });

  async function picture(page, shown) {
    if (!options.screenshots) return;
    await page.screenshot({ path: join(options.screenshots, `${shown}-${options.vue ? "vue" : "classic"}.png`), timeout: 120_000 });
  }

  /** With `listens`, errors and warnings of the page are problems too. */
  async function checked(viewport, body, { listens }) {
    if (positionals.length < least) throw new NotChecked(`give ${needs}`);
    const [address, ...files] = positionals;
    const server = address.replace(/\/$/, "");
    await configure(server, { "Comfy.VueNodes.Enabled": options.vue });
    const browser = await launch();
    try {
      const page = await (await browser.newContext({ viewport })).newPage();
      if (listens) listen(page, { problems });
      await open(page, server);
      await body(page, files);
    } finally {
      await browser.close();
    }
    problems.forEach((problem) => console.log(`problem: ${problem}`));
    console.log(`${name}: ${problems.length} problem(s)`);
    return problems.length ? 1 : 0;
  }

  async function run(viewport, body, { listens = true } = {}) {
    try {
      process.exitCode = await checked(viewport, body, { listens });
    } catch (error) {
      console.error(error instanceof NotChecked ? `check_${name}: ${error.message}` : error);
      process.exitCode = error instanceof NotChecked ? 2 : 1;
    }
  }

  return { options, problems, picture, run };
}
