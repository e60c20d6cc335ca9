"use strict";
(function () {
  const {charts, pool} = JSON.parse(document.getElementById("charts").textContent);
  const types = {
    u1: Uint8Array, u2: Uint16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array,
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printWidth = 680;
  const axisRoom = 75;  // what the axis of panels takes, whose labels have a fixed width
  const legendRoom = 100;
  const drawn = new Map();
  const turns = new Map();
  let printing = false;

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function config(width, longest) {
    const size = width < 560 ? 10 : 12;
    const text = color("--text");
    return {
      background: "transparent", font: getComputedStyle(document.body).fontFamily, padding: 2,
      view: {stroke: null},
      aria: false,  // a sentence for each mark takes long, and the figure has its own
      axis: {
        labelColor: text, titleColor: text, titleFontWeight: "normal", labelFontSize: size,
        titleFontSize: size, gridColor: color("--line"), domainColor: color("--soft"),
        tickColor: color("--soft"),
      },
      legend: {
        orient: "top", layout: {top: {direction: width < 560 ? "vertical" : "horizontal"}},
        labelColor: text, titleColor: text, titleFontWeight: "normal",
        labelFontSize: size, titleFontSize: size, labelLimit: width - 40, symbolOpacity: 1,
        columns: Math.max(1, Math.floor(width / (0.55 * size * longest + 40))),
      },
      line: {strokeWidth: 2}, point: {size: 45, strokeWidth: 1.5}, rule: {color: text}, text: {color: text, fontSize: size},
    };
  }

  function numbers(column) {
    const bytes = Uint8Array.from(atob(column.data), letter => letter.charCodeAt(0));
    return Array.from(new types[column.type](bytes.buffer), one => (isNaN(one) ? null : one));
  }

  function column(number) {
    const value = pool[number];
    if (!value.texts) return numbers(value);
    return numbers(pool[value.codes]).map(code => value.texts[code]);
  }

  function rows(columns) {
    const names = Object.keys(columns);
    const values = names.map(name => column(columns[name]));
    return values[0].map((_, row) => (
      Object.fromEntries(names.map((name, place) => [name, values[place][row]]))
    ));
  }

  // Without what the mouse does a picture is drawn in a third of the time.
  function still(layer) {
    delete layer.params;
    delete layer.encoding.tooltip;
    const {opacity} = layer.encoding;
    if (opacity) layer.encoding.opacity = {value: opacity.condition.value};
  }

  function specification(view, width, height, isLive) {
    const spec = structuredClone(pool[view.spec]);
    if (!isLive) {
      for (const panel of spec.vconcat || [spec]) {
        panel.layer = panel.layer.filter(layer => layer.name !== "hover");
        panel.layer.forEach(still);
      }
    }
    spec.datasets = {};
    for (const name in view.data) spec.datasets[name] = rows(view.data[name]);
    spec.params = [{name: "paper", value: color("--page")}];
    spec.config = config(width, spec.usermeta.legend);
    for (const panel of spec.vconcat || []) {
      panel.width = width - axisRoom;
      panel.height = (height - legendRoom) / spec.vconcat.length;
    }
    if (spec.layer) {
      Object.assign(spec, {width, height, autosize: {type: "fit", contains: "padding"}});
    }
    for (const layer of spec.layer || []) {
      if (layer.params && matchMedia("(pointer: coarse)").matches) {  // else none could scroll
        layer.params = layer.params.filter(param => param.name !== "zoom");
      }
    }
    return spec;
  }

  // One drawing of a figure after the other, so that the last that was asked for stays.
  function draw(figure, isLive) {
    turns.set(figure, Promise.resolve(turns.get(figure)).then(() => embed(figure, isLive)));
  }

  async function embed(figure, isLive) {
    const chosen = [];
    for (const field of figure.querySelectorAll("fieldset")) {
      chosen.push((field.querySelector("select") || field.querySelector("input:checked")).value);
    }
    const view = charts[figure.id][chosen.join(".")];
    const drawing = figure.querySelector(".drawing");
    const width = printing ? printWidth : drawing.clientWidth;
    const full = parseInt(figure.style.getPropertyValue("--height"), 10);
    const spec = specification(view, width, printing ? 0.8 * full : full, isLive);
    if (drawn.has(figure)) drawn.get(figure).finalize();
    drawn.set(figure, {width, isLive, finalize() {}});
    const result = await vegaEmbed(drawing, spec, {
      mode: "vega-lite", actions: false, ast: true, defaultStyle: false,
      renderer: printing ? "svg" : "canvas", tooltip: {disableDefaultStyle: true},
    });
    drawing.view = result.view;
    if (isLive) drawing.dataset.live = "yes";
    drawn.set(figure, {width, isLive, finalize: result.finalize});
  }

  function enliven(figure) {
    if (drawn.has(figure) && !drawn.get(figure).isLive) draw(figure, true);
  }

  function redraw() {
    for (const [figure, {isLive}] of drawn) draw(figure, isLive);
  }

  const figures = document.querySelectorAll("figure.plot");
  const nearby = new IntersectionObserver(function (entries) {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        nearby.unobserve(entry.target);
        setTimeout(draw, 0, entry.target);  // one by one, so that the first is soon seen
      }
    }
  }, {rootMargin: "400px"});
  for (const figure of figures) {
    figure.addEventListener("change", () => draw(figure, true));
    figure.addEventListener("pointerenter", () => enliven(figure));
    nearby.observe(figure);
  }
  dark.addEventListener("change", redraw);
  let timer;
  addEventListener("resize", function () {
    clearTimeout(timer);
    timer = setTimeout(function () {
      for (const [figure, {width, isLive}] of drawn) {
        const isWrong = figure.querySelector(".drawing").clientWidth !== width;
        if (!printing && isWrong) draw(figure, isLive);
      }
    }, 100);
  });
  addEventListener("beforeprint", function () {
    printing = true;
    document.documentElement.classList.add("printing");  // colors of paper, also in dark mode
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      details.dataset.closed = "";
    }
    figures.forEach(figure => draw(figure, false));
  });
  addEventListener("afterprint", function () {
    printing = false;
    document.documentElement.classList.remove("printing");
    for (const details of document.querySelectorAll("details[data-closed]")) {
      details.open = false;
      delete details.dataset.closed;
    }
    setTimeout(redraw);  // once the page has the width of the window again
  });
})();
