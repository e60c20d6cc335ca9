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
      axis: {
        labelColor: text, titleColor: text, titleFontWeight: "normal", labelFontSize: size,
        titleFontSize: size, gridColor: color("--line"), domainColor: color("--soft"),
        tickColor: color("--soft"),
      },
      legend: {
        orient: "top", labelColor: text, titleColor: text, titleFontWeight: "normal",
        labelFontSize: size, titleFontSize: size, labelLimit: width - 40, symbolOpacity: 1,
        columns: Math.max(1, Math.floor(width / (0.55 * size * longest + 40))),
      },
      rule: {color: text}, text: {color: text, fontSize: size},
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

  function specification(view, width, height) {
    const spec = structuredClone(pool[view.spec]);
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

  async function draw(figure) {
    const chosen = [];
    for (const field of figure.querySelectorAll("fieldset")) {
      chosen.push((field.querySelector("select") || field.querySelector("input:checked")).value);
    }
    const view = charts[figure.id][chosen.join(".")];
    const drawing = figure.querySelector(".drawing");
    const width = printing ? printWidth : drawing.clientWidth;
    const full = parseInt(figure.style.getPropertyValue("--height"), 10);
    const spec = specification(view, width, printing ? 0.8 * full : full);
    if (drawn.has(figure)) drawn.get(figure).finalize();
    drawn.set(figure, {width, finalize() {}});
    const result = await vegaEmbed(drawing, spec, {
      mode: "vega-lite", actions: false, ast: true, defaultStyle: false,
      renderer: printing ? "svg" : "canvas", tooltip: {disableDefaultStyle: true},
    });
    drawing.view = result.view;
    drawn.set(figure, {width, finalize: result.finalize});
  }

  function redraw() {
    for (const figure of drawn.keys()) draw(figure);
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
    figure.addEventListener("change", () => draw(figure));
    nearby.observe(figure);
  }
  dark.addEventListener("change", redraw);
  let timer;
  addEventListener("resize", function () {
    clearTimeout(timer);
    timer = setTimeout(function () {
      for (const [figure, {width}] of drawn) {
        if (!printing && figure.querySelector(".drawing").clientWidth !== width) draw(figure);
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
    figures.forEach(draw);
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
