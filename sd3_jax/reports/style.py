"""The report's style sheet: one column, system fonts, figures that line up."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1b1f26; --soft: #596270; --faint: #8d95a1; --rule: #e3e6ea;
  --paper: #ffffff; --wash: #f6f7f9; --accent: #2a5bd7; --bar: #a9c0f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaed; --soft: #a4adb9; --faint: #78818e; --rule: #2d333b;
    --paper: #14171b; --wash: #1c2026; --accent: #7ea2ff; --bar: #3d5698;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1060px; margin: 0 auto; padding: 72px 32px 96px; }
.eyebrow {
  margin: 0; color: var(--accent); font-size: 13px; font-weight: 600;
  letter-spacing: .08em; text-transform: uppercase;
}
h1 { margin: 6px 0 10px; font-size: 44px; line-height: 1.12; letter-spacing: -.022em; }
h1, h2 { overflow-wrap: anywhere; }
.lede { margin: 0; max-width: 46em; color: var(--soft); font-size: 18px; }
section { margin-top: 72px; }
h2 { margin: 0 0 4px; font-size: 25px; line-height: 1.25; letter-spacing: -.012em; }
h3 { margin: 0; font-size: 15px; font-weight: 600; }
p { margin: 0 0 16px; max-width: 46em; }
p.note, figcaption, .caption { color: var(--soft); font-size: 14px; line-height: 1.5; }
section > h2 + * { margin-top: 20px; }
section > h2 + p { margin-top: 4px; }

.stats {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr));
  gap: 28px 24px; margin: 36px 0 0; padding: 28px 0 20px;
  border-top: 1px solid var(--rule);
}
.stats dt { color: var(--soft); font-size: 13px; }
.stats dd { margin: 0; font-size: 27px; line-height: 1.2; letter-spacing: -.015em; }
.stats dd small {
  margin-left: .25em; color: var(--soft); font-size: 14px; letter-spacing: 0;
}
.stats div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }

.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 44px 48px;
}
.panels figure { display: flex; flex-direction: column; }
figure { margin: 0; }
figure svg {
  display: block; width: 100%; height: auto; margin: 10px 0 6px; overflow: visible;
}
svg text { font-family: inherit; }

figure.sheet img, .film img { border-radius: 6px; background: #fff; }
img { display: block; max-width: 100%; height: auto; }
figure.sheet { text-align: left; }
figure.sheet img { border: 1px solid var(--rule); }
figure.sheet figcaption { margin-top: 10px; }
.film {
  display: grid; gap: 28px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr));
}
.film img { width: 100%; border: 1px solid var(--rule); cursor: zoom-in; }
.film figcaption { margin-top: 6px; }
.film .close { display: none; }
.film figure:target {
  position: fixed; inset: 0; z-index: 2; display: grid; place-content: center;
  padding: 20px; background: var(--paper);
}
.film figure:target img {
  width: auto; max-height: calc(100vh - 90px); cursor: default;
}
.film figure:target .close {
  display: block; position: absolute; inset: 0; font-size: 0;
}

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; line-height: 1.4; }
th {
  padding: 8px 20px 8px 0; border-bottom: 1px solid var(--faint); color: var(--soft);
  font-size: 13px; font-weight: 500; text-align: left; white-space: nowrap;
}
td {
  padding: 8px 20px 8px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
}
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
.soft { color: var(--soft); }
tbody tr:last-child td { border-bottom: 0; }
td.bar { width: 26%; min-width: 110px; vertical-align: middle; }
.track {
  display: block; position: relative; height: 4px; border-radius: 2px;
  background: var(--rule);
}
.track i {
  position: absolute; top: -3px; bottom: -3px; border-radius: 2px;
  background: var(--bar);
}
.track b {
  position: absolute; top: -5px; bottom: -5px; width: 3px; margin-left: -1.5px;
  border-radius: 2px; background: var(--accent);
}
code, td.code {
  font: 13.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono",
    monospace;
  overflow-wrap: anywhere;
}
td.code { padding-top: 5px; padding-bottom: 5px; }

details { margin-top: 12px; border-top: 1px solid var(--rule); }
details + details { margin-top: 0; }
details:last-child { border-bottom: 1px solid var(--rule); }
summary { padding: 12px 0; color: var(--soft); font-size: 15px; cursor: pointer; }
summary:hover { color: var(--accent); }
details > :last-child:not(summary) { margin-bottom: 20px; }
ol.prompts {
  margin: 12px 0 0; padding-left: 2.2em; columns: 320px 3; column-gap: 40px;
  color: var(--soft); font-size: 14px; line-height: 1.5;
}
ol.prompts li { break-inside: avoid; padding: 0 0 3px 4px; overflow-wrap: anywhere; }
footer {
  margin-top: 88px; padding-top: 16px; border-top: 1px solid var(--rule);
  color: var(--faint); font-size: 13px;
}
a { color: var(--accent); }
@media (max-width: 640px) {
  main { padding: 40px 20px 64px; }
  h1 { font-size: 34px; }
  section { margin-top: 52px; }
}
@media print {
  .film { grid-template-columns: repeat(3, 1fr); }
  section { break-inside: avoid; }
}
"""
