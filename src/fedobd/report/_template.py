"""Template: the page's HTML, style and script; everything else of it is filled in by `_page`.

The page loads nothing: its content policy allows no request at all, and no script but the two that
stand in it, by their hashes.
"""

from __future__ import annotations

from string import Template

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>Report</h1>
<p>$lead</p>
</header>
<main>
$body
</main>
<footer><p>Written by fedobd $version. Bytes are the lengths of payloads that were encoded, sent
and decoded; 1 MB is 1,000,000 bytes.</p></footer>
<script type="application/json" id="plots">$plots</script>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
""")

FIGURE = Template("""\
<figure class="plot" id="$id" style="--height: ${height}px">
$switches
<div class="drawing" role="img" aria-label="$title: $caption"></div>
<noscript><p>This picture needs JavaScript; the tables do not.</p></noscript>
<figcaption>$caption</figcaption>
</figure>
""")

STYLE = """
:root {
  --page: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --shade: #f3f5f7;
  --link: #0b5cad; --best: #d7f0dc; --warn: #fff3cd; --warn-line: #b58100;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --text: #e6e9ed; --soft: #a3adb8; --line: #3a424c; --shade: #1d232a;
    --link: #79b8ff; --best: #1d4429; --warn: #3d3207; --warn-line: #d9a514;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 80rem; padding: 1rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { margin: 2rem 0 0.5rem; }
header p, footer, figcaption, .note { color: var(--soft); }
a { color: var(--link); }
figure { margin: 0; }
figcaption, .note { font-size: 0.875rem; max-width: 50rem; }
.drawing { height: var(--height); }
.scroll {
  overflow-x: auto; margin-bottom: 1rem;
  background:
    linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat;
}
table {
  border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9375rem;
  overflow-wrap: break-word; width: max-content;
}
caption { text-align: left; color: var(--soft); font-size: 0.875rem; padding-bottom: 0.4rem; }
caption span { display: block; max-width: min(50rem, calc(100vw - 2rem)); }
th, td {
  padding: 0.3rem 0.75rem 0.3rem 0; text-align: right; border-bottom: 1px solid var(--line);
}
td { white-space: nowrap; }
thead th { vertical-align: bottom; font-size: 0.875rem; white-space: pre-line; }
th:first-child { position: sticky; left: 0; background: var(--page); }
tbody th span { display: block; max-width: 18rem; }
th:first-child, .words th, .words td { text-align: left; }
tbody th { font-weight: 600; }
td.best { font-weight: 700; }
td.best span { background: var(--best); padding: 0.1rem 0.3rem; border-radius: 0.25rem; }
fieldset {
  display: inline-block; border: 0; margin: 0 1.5rem 0.25rem 0; padding: 0;
  max-width: 100%; min-width: 0;
}
legend { float: left; padding: 0; margin-right: 0.5rem; color: var(--soft); }
fieldset[hidden] { display: none; }
fieldset label { display: inline-block; margin-right: 0.75rem; }
select { font: inherit; max-width: 100%; color: inherit; background: var(--shade); }
.headline { font-size: 1.125rem; max-width: 50rem; }
.warning {
  margin: 1rem 0; padding: 0.75rem 1rem; background: var(--warn);
  border-left: 0.3rem solid var(--warn-line);
}
pre { background: var(--shade); padding: 0.75rem; overflow-x: auto; font-size: 0.875rem; }
summary { cursor: pointer; padding: 0.35rem 0; }
@media (max-width: 40rem) {
  body { padding: 0.75rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding-right: 0.6rem; font-size: 0.875rem; }
  tbody th span { max-width: 8.5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  form { display: none; }
  section + section { break-before: page; }
  h2, h3, caption { break-after: avoid; }
  figure, tr, .warning { break-inside: avoid; }
  .scroll { overflow: visible; background: none; }
  table { width: auto; }
  .drawing { height: calc(0.8 * var(--height)); }
  th, td, thead th { padding: 0.15rem 0.3rem 0.15rem 0; font-size: 6.5pt; }
  .words td { white-space: normal; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 7pt; }
  pre.toml { columns: 2; }
}
"""

SCRIPT = """
"use strict";
(function () {
  const {plots, arrays} = JSON.parse(document.getElementById("plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printWidth = 680;
  const drawn = new Set();
  let printing = false;

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function template() {
    const axis = {
      gridcolor: color("--line"), linecolor: color("--soft"), zerolinecolor: color("--line"),
    };
    return {layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: color("--text"), size: innerWidth < 640 ? 10 : 12, family: "inherit"},
      xaxis: axis, yaxis: axis, margin: {l: 10, r: 10, t: 30, b: 10},
      shapedefaults: {line: {color: color("--text")}},
    }};
  }

  function filled(trace) {
    const copy = {};
    for (const key in trace) {
      const value = trace[key];
      copy[key] = "array" in Object(value) ? arrays[value.array] : value;
    }
    return copy;
  }

  function draw(figure) {
    const chosen = [];
    for (const field of figure.querySelectorAll("fieldset")) {
      chosen.push((field.querySelector("select") || field.querySelector("input:checked")).value);
    }
    const view = plots[figure.id][chosen.join(".")];
    const layout = structuredClone(view.layout);
    layout.template = template();
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    if (printing) {
      layout.width = printWidth;
      layout.height = 0.8 * parseInt(figure.style.getPropertyValue("--height"), 10);
    }
    const options = {responsive: true, displayModeBar: false};
    Plotly.react(figure.querySelector(".drawing"), view.data.map(filled), layout, options);
    drawn.add(figure);
  }

  const figures = document.querySelectorAll("figure.plot");
  const nearby = new IntersectionObserver(function (entries) {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        nearby.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, {rootMargin: "400px"});
  for (const figure of figures) {
    figure.addEventListener("change", function () { draw(figure); });
    nearby.observe(figure);
  }
  dark.addEventListener("change", function () { drawn.forEach(draw); });
  addEventListener("beforeprint", function () {
    printing = true;
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      details.dataset.closed = "";
    }
    figures.forEach(draw);
  });
  addEventListener("afterprint", function () {
    printing = false;
    for (const details of document.querySelectorAll("details[data-closed]")) {
      details.open = false;
      delete details.dataset.closed;
    }
    setTimeout(function () {  // once the page has the width of the window again
      figures.forEach(draw);
      figures.forEach(figure => Plotly.Plots.resize(figure.querySelector(".drawing")));
    });
  });
})();
"""
