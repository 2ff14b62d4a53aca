// Lighthouse's accessibility audits of the one page that a browser has open, as JSON: its part of tools/lighthouse.py.
//
//   node tools/lighthouse.mjs FOLDER PORT
//
// FOLDER: where `npm install lighthouse` was run. PORT: the browser's, for debugging.
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, port] = process.argv.slice(2);
const { resolve } = createRequire(join(folder, "package.json"));
const load = (name) => import(pathToFileURL(resolve(name)).href);
const { snapshot, defaultConfig, desktopConfig } = await load("lighthouse");
const { default: puppeteer } = await load("puppeteer-core");

const browser = await puppeteer.connect({ browserURL: `http://127.0.0.1:${port}`, defaultViewport: null });
const [page] = await browser.pages();
const found = {};
for (const [screen, config] of Object.entries({ desktop: desktopConfig, phone: defaultConfig })) {
  const { lhr } = await snapshot(page, { config, flags: { onlyCategories: ["accessibility"], logLevel: "error" } });
  const { score, auditRefs } = lhr.categories.accessibility;
  const failed = auditRefs.map(({ id }) => lhr.audits[id]).filter((audit) => audit.score !== null && audit.score < 1);
  found[screen] = {
    score: Math.round(100 * score),
    audits: auditRefs.filter(({ id }) => lhr.audits[id].score !== null).length,
    failed: failed.map(({ id, details }) => [id, (details?.items ?? []).map(({ node }) => node?.snippet ?? "")]),
    version: lhr.lighthouseVersion,
  };
}
console.log(JSON.stringify(found));
await browser.disconnect();
