"""The page's stylesheet: two colour schemes, one column on a phone."""

CSS = """
:root { --ink: #1b2430; --soft: #5d6b7c; --rule: #dfe4ea; --paper: #ffffff; --panel: #f6f8fa;
  --c0: #2563b0; --c1: #d8692a; --c2: #2c8c6b; --c3: #8a5bb5; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #94a2b3; --rule: #2c3643;
  --paper: #11161d; --panel: #19212b; --c0: #6ea8ec; --c1: #f0935c; --c2: #5cc09b;
  --c3: #b892dc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 0 0 10px; max-width: 75ch; }
small, .soft, .missing { color: var(--soft); }
.missing { font-style: italic; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 290px)); gap: 12px;
  margin: 22px 0 12px; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 26px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; color: var(--soft);
  align-items: center; min-height: 20px; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
.key b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.scale { gap: 0; }
.ramp { display: inline-block; width: 140px; height: 10px; border-radius: 2px; margin: 0 7px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.band { opacity: 0.16; stroke: none; }
i.c0, .band.c0, .dot.c0 { background: var(--c0); fill: var(--c0); } .line.c0 { stroke: var(--c0); }
i.c1, .band.c1, .dot.c1 { background: var(--c1); fill: var(--c1); } .line.c1 { stroke: var(--c1); }
i.c2, .band.c2, .dot.c2 { background: var(--c2); fill: var(--c2); } .line.c2 { stroke: var(--c2); }
i.c3, .band.c3, .dot.c3 { background: var(--c3); fill: var(--c3); } .line.c3 { stroke: var(--c3); }
.map + .map { margin-top: 26px; } .map svg { min-width: 760px; }
.map rect { shape-rendering: crispEdges; } .map svg text { font-size: 12px; }
.wide { overflow-x: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr));
  gap: 18px; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated;
  border-radius: 3px; }
.pictures img { width: 100%; }
.wide img { min-width: 720px; image-rendering: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 0 5px 28px; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; }
.facts table { width: 100%; } .facts td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; } .facts th { width: 1%; color: var(--soft); font-weight: 400; }
.config { columns: 3 320px; column-gap: 40px; }
.config section { break-inside: avoid; margin-bottom: 18px; } .config h3 { margin-top: 0; }
.config td, .facts td { padding-left: 18px; } .config table { font-size: 13px; }
.config th, .config td { padding-top: 3px; padding-bottom: 3px; }
table + details, .wide + details { margin-top: 10px; }
details summary { cursor: pointer; color: var(--soft); }
details[open] summary { margin-bottom: 14px; }
code { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; white-space: normal; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 560px) { main { padding: 20px 16px 48px; } h1 { font-size: 25px; }
  h2 { margin-top: 34px; } .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px 12px; } .tile b { font-size: 20px; } th, td { padding-left: 16px; } }
@media print { main { max-width: none; padding: 0; } figure, .tile { break-inside: avoid; } }
"""
