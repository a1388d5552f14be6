"""How the report's page looks, by day and by night."""

STYLE = """<style>
:root { --paper: #fafaf8; --card: #fff; --ink: #1d2126; --soft: #68707a; --line: #e4e5e1; --good: #1d7f4e;
  --bad: #b3372b; --other: #7a4fb0; --warn: #fff4d9; --warn-ink: #6b4e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1d2126; --ink: #e7e9ec; --soft: #99a2ad;
  --line: #30363d; --good: #58c890; --bad: #f0857a; --other: #c09cf0; --warn: #3a3018; --warn-ink: #f1d48a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 28px; margin: 0 0 16px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 4px; }
h3 { font-size: 14px; margin: 18px 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0; }
.note { color: var(--soft); max-width: 78ch; margin-bottom: 10px; }
.warning { background: var(--warn); color: var(--warn-ink); padding: 8px 12px; border-radius: 8px; margin: 8px 0; }
.soft { color: var(--soft); font-weight: 400; font-size: 13px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 16px; }
.tiles b { display: block; font-size: 18px; }
.tiles span { color: var(--soft); font-size: 12px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: 12px; color: var(--soft); font-weight: 600; vertical-align: bottom; }
th b { color: var(--ink); }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; min-width: 190px; }
.mean { display: block; font-weight: 600; white-space: nowrap; }
.bounds { display: block; color: var(--soft); font-size: 12px; white-space: nowrap; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.other { color: var(--other); } .noise { color: var(--soft); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .axis { font-size: 11.5px; } svg .grid { stroke: var(--line); }
.key { list-style: none; padding: 0; margin: 6px 0 0; font-size: 12.5px; color: var(--soft); }
.strip { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin: 6px 0 12px; }
.strip > div { flex: 1 1 260px; }
.strip img { display: block; max-width: 100%; border-radius: 6px; border: 1px solid var(--line); }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
a { color: inherit; }
</style>"""
